// Makes OpenMP's threads go to sleep soon where they wait.
#pragma once

namespace fused_lstm::cpu {

// At the end of each parallel region and until the next, libgomp's threads spin for some 10 ms. That
// is time of a processor which somebody else wants, and when the next region comes, theirs is used
// up. But where libgomp counts more threads than processors, they sleep after 100 turns
// (GOMP_SPINCOUNT in its manual). So while processors are in demand, a crowd of threads that only
// sleep brings its count above. That holds for torch's regions too. Results do not depend on it.
//
// No-ops where OpenMP isn't libgomp. Any thread may call, not in a forked child.
//
// threads: of the team that computes.
void keep_crowd(int threads);
void dismiss_crowd();

}  // namespace fused_lstm::cpu
