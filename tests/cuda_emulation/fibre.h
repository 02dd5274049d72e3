// Threads of our own making: what a fibre needs to be left and resumed, and their stacks. On x86-64
// a switch is a dozen instructions; elsewhere ucontext does it, which asks the kernel each time.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#if !defined(__x86_64__) && !defined(FUSED_LSTM_EMULATION_UCONTEXT)
#define FUSED_LSTM_EMULATION_UCONTEXT
#endif
#ifdef FUSED_LSTM_EMULATION_UCONTEXT
#include <ucontext.h>
#endif

namespace fused_lstm::cuda::emulation {

#ifdef FUSED_LSTM_EMULATION_UCONTEXT

using Context = ucontext_t;

// Leaves `from`, to be resumed by another switch, and goes on with `to`.
inline void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }

// Makes `context` one that calls start(), which must not return, on this stack.
inline void make_context(Context& context, char* stack, size_t bytes, void (*start)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = bytes;
  context.uc_link = nullptr;
  makecontext(&context, start, 0);
}

#else

struct Context {
  void* stack_pointer;
};

// Saves what the calling convention has a function keep, changes the stack, and takes it back.
extern "C" void fused_lstm_emulation_switch(void** from, void* to);
asm(R"(
    .text
    .hidden fused_lstm_emulation_switch
    .weak fused_lstm_emulation_switch
fused_lstm_emulation_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");

inline void switch_context(Context& from, Context& to) {
  fused_lstm_emulation_switch(&from.stack_pointer, to.stack_pointer);
}

inline void make_context(Context& context, char* stack, size_t bytes, void (*start)()) {
  // From the top: no caller to return to, start as what the switch returns to, six registers.
  void** top = reinterpret_cast<void**>(stack + bytes);
  top[-1] = nullptr;
  top[-2] = reinterpret_cast<void*>(start);
  for (int i = 3; i <= 8; ++i) top[-i] = nullptr;
  context.stack_pointer = top - 8;
}

#endif

// Equal pieces of memory of our own, each ending at a page that nothing may touch. They are kept
// and reused; what lies in them is from before.
class Pieces {
 public:
  // At least `count` pieces of at least `bytes` bytes.
  void reserve(size_t count, size_t bytes) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    const size_t wanted = (bytes + page - 1) / page * page + page;
    if (count <= count_ && wanted <= stride_) return;
    if (base_) munmap(base_, count_ * stride_);
    page_ = page;
    count_ = count > count_ ? count : count_;
    stride_ = wanted > stride_ ? wanted : stride_;
    void* mapped = mmap(nullptr, count_ * stride_, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) {
      std::perror("CUDA emulation: mmap");
      std::abort();
    }
    base_ = static_cast<char*>(mapped);
    // Each makes two mappings of one, and Linux lets a process have 65,530: of very many pieces,
    // only some end so.
    constexpr size_t kMostGuards = 20'000;
    const size_t every = (count_ + kMostGuards - 1) / kMostGuards;
    for (size_t i = 0; i < count_; i += every) mprotect(end(i), page_, PROT_NONE);
  }
  char* begin(size_t i) const { return base_ + i * stride_; }
  char* end(size_t i) const { return base_ + (i + 1) * stride_ - page_; }

 private:
  char* base_ = nullptr;
  size_t count_ = 0, stride_ = 0, page_ = 0;
};

}  // namespace fused_lstm::cuda::emulation
