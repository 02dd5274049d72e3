// The forward of a stack of layers, a few rows a step, by threads that work on different layers at
// once: while one is at some steps of a layer, another is at earlier steps of the layer above.
//
// The sequence is cut into chunks of steps. Of each chunk and layer two tasks are done: x W_ih^T of
// all its steps, when the layer below has got so far, and the recurrence, when the chunk before has
// gone through it. Threads take whatever task is ready, so nobody waits at a step, and the layers'
// shares need not be equal. A thread keeps to its layer, whose weights and states its caches have,
// until it is too far ahead of the topmost one, or nothing there is ready.
//
// Kept in the workspace: what a forward of each layer on one thread keeps (forward.h), with the
// inputs of two chunks; how far each layer has got. Tasks are claimed by compare-and-swap; whoever
// finds none that is ready waits for the next that ends.
#pragma once

#include "forward.h"

namespace fused_lstm::cpu::FUSED_LSTM_ISA {

template <class T>
struct WavefrontPass {
  using Layer = ForwardPass<T>;
  using Gemm = typename Layer::Gemm;
  static constexpr int kMostLayers = 8;
  static constexpr int64_t kChunks = 16;      // a thread waits for one at either end
  static constexpr int64_t kFewestRows = 16;  // of a chunk: W_ih is read once for them
  // Chunks that a layer may be ahead of the topmost one. With 3, three layers of H 128 take 2 %
  // longer, without a bound 10 %.
  static constexpr int kLead = 5;
  // Of a layer's weights: of larger ones, threads that share a step read a part each. In float, H
  // 160 is 1.04 to 1.1 times as fast with layers at once, H 200 0.95 to 1.05, H 256 0.85 to 1.0.
  static constexpr int64_t kMostBytes = 1 << 20;

  // Of a layer, in chunks.
  struct alignas(64) Progress {
    int inputs_claimed, hidden_claimed, hidden_done;
    int inputs_done[2];  // 1 + the last chunk whose inputs lie in this slot
  };

  int count;  // of layers
  int team;
  int chunks;
  Layer layers[kMostLayers];
  Progress* progress;
  Barriers barriers;  // one for the start, one for each task that ends

  // Whether a stack whose first layer is this is faster so than one layer after the other, whose
  // threads meet at each step or have a part of the rows each. Where these fill a tile, they are as
  // fast, and need no other layers.
  static bool pays(const Sequence& first, int count, int threads) {
    if (count < 2 || count > kMostLayers || threads < 2) return false;
    Sequence above = first;
    above.I = first.P;
    above.ids = nullptr;
    const ForwardKind kind = Layer::kind(above);
    const ForwardPlan plan(above, 1, threads, kind);
    const int64_t bytes = 4 * plan.seq.H * (plan.x_padded + plan.h_padded) * kind.element_bytes;
    return !plan.dense && plan.few && bytes <= kMostBytes &&
           first.T >= kChunks / 2 * chunk_steps(first) &&
           count * plan.products() >= kParallelProducts &&
           (plan.team.unit_groups > 1 || 3 * first.B < 4 * kind.tile_rows);
  }

  static int64_t chunk_steps(const Sequence& seq) {
    const int64_t even = (seq.T + kChunks - 1) / kChunks;
    const int64_t fewest = (kFewestRows + seq.B - 1) / seq.B;
    return even > fewest ? even : fewest;
  }

  WavefrontPass(const Forward* args, int count, int threads)
      : count(count), team(threads < count ? threads : count) {
    for (int l = 0; l < count; ++l) layers[l] = Layer(args + l, 1, 1, chunk_steps(args[l].seq));
    chunks = int((args[0].seq.T + layers[0].chunk_steps - 1) / layers[0].chunk_steps);
  }

  int64_t lay_out(void* workspace) {
    Arena arena{static_cast<char*>(workspace)};
    barriers.take(arena, 2);
    progress = arena.take<Progress>(count);
    for (int l = 0; l < count; ++l) {
      char* base = arena.base ? arena.base + arena.used : nullptr;
      arena.used += round_up(layers[l].lay_out(base), 4096);
    }
    return arena.used;
  }

  int team_size() const { return team; }
  int64_t group_products() const {
    int64_t products = 0;
    for (int l = 0; l < count; ++l) products += layers[l].products();
    return products;
  }

  void run(int thread) const {
    if (thread >= team) return;
    if (thread == 0) memset(progress, 0, sizeof(Progress) * size_t(count));
    for (int l = 0; l < count; ++l) layers[l].prepare(thread, team);
    barriers[0].wait(team);
    Barrier& ended = barriers[1];
    int home = thread;
    int64_t began = nanoseconds();
    for (;;) {
      const int before = ended.now();
      if (left_to_another(ended, thread)) return;
      if (run_task(home)) {
        ended.add_one();
        continue;
      }
      if (load(progress[count - 1].hidden_claimed) == chunks) return;
      ended.wait_while(before, began);
      began = nanoseconds();
    }
  }

  // Beside busy processes whoever waits for one that has lost its processor goes on alone, in the
  // end; the others finish what they have claimed.
  static bool left_to_another(Barrier& ended, int thread) {
    int alone = load(ended.alone);
    if (!alone && ended.out_of_patience()) swap(ended.alone, alone, thread + 1);
    alone = load(ended.alone);
    return alone && alone != thread + 1;
  }

  bool run_task(int& home) const {
    const int lead = load(progress[home].hidden_claimed) - load(progress[count - 1].hidden_claimed);
    if (lead < kLead && run_task_of(home)) return true;
    for (int l = count - 1; l >= 0; --l)
      if (run_task_of(l)) {
        home = l;
        return true;
      }
    return false;
  }

  bool run_task_of(int l) const { return run_hidden(l) || take_inputs(l); }

  bool take_inputs(int l) const {
    Progress& of = progress[l];
    const int chunk = load(of.inputs_claimed);
    const bool ready = chunk < chunks && load(of.hidden_done) >= chunk - 1 &&
                       (l == 0 || load(progress[l - 1].hidden_done) > chunk);
    if (!ready || !swap(of.inputs_claimed, chunk, chunk + 1)) return false;
    layers[l].take_inputs(part(l, chunk), chunk * layers[l].chunk_steps);
    store(of.inputs_done[chunk % 2], chunk + 1);
    return true;
  }

  bool run_hidden(int l) const {
    Progress& of = progress[l];
    const int chunk = load(of.hidden_claimed);
    const bool ready = chunk < chunks && load(of.inputs_done[chunk % 2]) == chunk + 1 &&
                       load(of.hidden_done) == chunk;
    if (!ready || !swap(of.hidden_claimed, chunk, chunk + 1)) return false;
    typename Layer::Part own = part(l, chunk);
    layers[l].run_steps(own, chunk * layers[l].chunk_steps);
    if (chunk + 1 == chunks) layers[l].write_c_n(own);
    store(of.hidden_done, chunk + 1);
    return true;
  }

  typename Layer::Part part(int l, int chunk) const {
    return layers[l].part_of(0, Place(layers[l].team, 0), 0, chunk % 2);
  }

  static int load(const int& value) { return __atomic_load_n(&value, __ATOMIC_ACQUIRE); }
  static void store(int& value, int to) { __atomic_store_n(&value, to, __ATOMIC_RELEASE); }
  static bool swap(int& value, int from, int to) {
    return __atomic_compare_exchange_n(&value, &from, to, false, __ATOMIC_ACQ_REL,
                                       __ATOMIC_RELAXED);
  }
};

}  // namespace fused_lstm::cpu::FUSED_LSTM_ISA
