// Makes a process see a processor with AVX2 and nothing wider, by LD_PRELOAD: what torch, oneDNN
// and fused_lstm choose by themselves on most PCs is then tested on any machine.
//
// Linux lets the instruction CPUID fault (arch_prctl, where the processor can); the handler executes
// it with the flags of AVX-512, AMX and what came with them taken out. Threads inherit the state,
// and a program that is started anew is masked again because LD_PRELOAD is inherited, too. The
// dynamic linker has asked before: the C library's own copies may still use wider registers.
//
// cc -shared -fPIC -o mask.so cpuid_mask.c -ldl
#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

enum { kSetCpuid = 0x1012 };  // ARCH_SET_CPUID: 0 makes the instruction fault, 1 lets it run

typedef int Sigaction(int, const struct sigaction*, struct sigaction*);

static Sigaction* next_sigaction(void) { return (Sigaction*)dlsym(RTLD_NEXT, "sigaction"); }

static void mask(uint32_t leaf, uint32_t subleaf, uint32_t* a, uint32_t* b, uint32_t* c,
                 uint32_t* d) {
  if (leaf == 7 && subleaf == 0) {
    *b &= ~(1u << 16 | 1u << 17 | 1u << 21 | 1u << 26 | 1u << 27 | 1u << 28 | 1u << 30 | 1u << 31);
    *c &= ~(1u << 1 | 1u << 6 | 1u << 11 | 1u << 12 | 1u << 14);
    *d &= ~(1u << 2 | 1u << 3 | 1u << 8 | 1u << 22 | 1u << 23 | 1u << 24 | 1u << 25);
  } else if (leaf == 0xd && subleaf == 0) {
    *a &= 7;  // the states that the system saves: x87, SSE, AVX
  } else if ((leaf == 7 && subleaf == 1) || leaf == 0x1d || leaf == 0x1e || leaf == 0x24) {
    *a = *b = *c = *d = 0;  // AVX-VNNI and later; AMX's tiles; AVX10
  }
}

static void on_fault(int signal_number, siginfo_t* info, void* context) {
  (void)info;
  greg_t* registers = ((ucontext_t*)context)->uc_mcontext.gregs;
  const uint8_t* at = (const uint8_t*)registers[REG_RIP];
  if (at[0] != 0x0f || at[1] != 0xa2) {  // not CPUID: the fault comes again, and ends the process
    signal(signal_number, SIG_DFL);
    return;
  }
  const uint32_t leaf = (uint32_t)registers[REG_RAX], subleaf = (uint32_t)registers[REG_RCX];
  uint32_t a, b, c, d;
  syscall(SYS_arch_prctl, kSetCpuid, 1);
  __asm__ volatile("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(leaf), "c"(subleaf));
  syscall(SYS_arch_prctl, kSetCpuid, 0);
  mask(leaf, subleaf, &a, &b, &c, &d);
  registers[REG_RAX] = a, registers[REG_RBX] = b, registers[REG_RCX] = c, registers[REG_RDX] = d;
  registers[REG_RIP] += 2;
}

// Nobody else takes the signal away, such as Python's faulthandler.
int sigaction(int number, const struct sigaction* action, struct sigaction* before) {
  return number == SIGSEGV ? 0 : next_sigaction()(number, action, before);
}

__attribute__((constructor)) static void start(void) {
  struct sigaction action;
  memset(&action, 0, sizeof action);
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
  next_sigaction()(SIGSEGV, &action, NULL);
  if (syscall(SYS_arch_prctl, kSetCpuid, 0)) perror("CPUID can't be made to fault");
}
