// Memory faults of fibres: they end the launch and not the process.
#pragma once

#include <csetjmp>
#include <csignal>
#include <vector>

namespace fused_lstm::cuda::emulation {

inline sigjmp_buf after_fault;  // where a fault goes on
inline volatile sig_atomic_t in_fibre;
inline void* volatile faulted;  // the address

inline void on_fault(int signal, siginfo_t* info, void*) {
  if (!in_fibre) {  // not a kernel's: let it happen again, and be what it would have been
    std::signal(signal, SIG_DFL);
    return;
  }
  in_fibre = false;
  faulted = info->si_addr;
  siglongjmp(after_fault, 1);
}

// While it lives, a fault of a fibre goes on after sigsetjmp(after_fault, 1).
class Faults {
 public:
  Faults() : stack_(64 << 10) {
    stack_t own = {};
    own.ss_sp = stack_.data();
    own.ss_size = stack_.size();
    sigaltstack(&own, &stack_before_);
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (int i = 0; i < 2; ++i) sigaction(kSignals[i], &action, &before_[i]);
  }
  ~Faults() {
    for (int i = 0; i < 2; ++i) sigaction(kSignals[i], &before_[i], nullptr);
    sigaltstack(&stack_before_, nullptr);
  }

 private:
  static constexpr int kSignals[2] = {SIGSEGV, SIGBUS};
  std::vector<char> stack_;
  stack_t stack_before_;
  struct sigaction before_[2];
};

}  // namespace fused_lstm::cuda::emulation
