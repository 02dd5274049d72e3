// One pass of the persistent path: what each launch needs, and in what order.
#include <algorithm>

#include "persistent.cuh"

namespace fused_lstm::cuda {
namespace {

size_t aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }

Tiling tiling_of(const Plan& plan, int H) {
  Tiling t{};
  t.slices = plan.slices;
  t.units = plan.units;
  t.groups = plan.groups;
  t.tiles = plan.tiles;
  t.row_tiles = row_tiles(plan);
  t.chunks = plan.chunks;
  t.shared_chunks = plan.shared_chunks;
  t.padded = padded_units(plan.operands, H);
  t.columns = weight_columns(plan.pass, plan.operands, H);
  t.all_chunks = weight_chunks(plan.operands, t.columns);
  t.partials = plan.partials;
  t.bias = plan.bias;
  t.cell = plan.cell;
  t.handed = plan.handed;
  t.states = plan.states;
  return t;
}

// Bytes of a row of h as blocks of a team exchange it: whole loads of 16 bytes.
int states_stride(const Plan& plan, int H) {
  return (H * element_bytes(plan.operands) + 15) / 16 * 16;
}

size_t weights_bytes(const Plan& plan) { return aligned(packed_words(plan) * sizeof(Words)); }

size_t states_bytes(const Plan& plan, const Extent& extent) {
  if (plan.pass == kBackward) return 0;
  return aligned((extent.B + extent.N) * size_t(states_stride(plan, extent.H)));
}

// Blocks of a team wait for each other, so all of them must run at once.
Grid grid_of(const Plan& plan) {
  return {plan.blocks(), plan.threads(), plan.shared_bytes, /*together=*/true};
}

auto forward_kernel(const Plan& plan) {
  return with_operands(plan.operands,
                       [&](auto kind) { return forward_kernel_for<decltype(kind)::value>(plan); });
}

auto backward_kernel(const Plan& plan) {
  return with_operands(plan.operands,
                       [&](auto kind) { return backward_kernel_for<decltype(kind)::value>(plan); });
}

// How many blocks of a plan's kernel a multiprocessor holds.
int resident(const Plan& plan) {
  return plan.pass == kForward ? resident_blocks(forward_kernel(plan), grid_of(plan))
                               : resident_blocks(backward_kernel(plan), grid_of(plan));
}

constexpr int kEmpty = 0xff;  // each byte of kNotYet

}  // namespace

Plan choose(Pass pass, Operands operands, int T, int B, int H, int directions) {
  Device device{};
  if (const char* error = properties(device)) {
    Plan none{};
    none.reason = error;
    return none;
  }
  Plan p = plan(device, pass, operands, T, B, H, directions);
  if (p.persistent && resident(p) * device.multiprocessors < p.blocks()) {
    p.persistent = false;
    p.reason = "the device does not hold " + std::to_string(p.blocks()) + " blocks at once";
  }
  return p;
}

size_t workspace_bytes(const Plan& plan, const Extent& extent) {
  return plan.directions * (weights_bytes(plan) + states_bytes(plan, extent));
}

const char* run(const Plan& plan, const ForwardLaunch& call, void* workspace, Stream stream) {
  ForwardParams params{};
  params.extent = call.extent;
  params.tiling = tiling_of(plan, call.extent.H);
  params.states_stride = states_stride(plan, call.extent.H);
  params.save = call.save;
  char* free = static_cast<char*>(workspace);
  for (int d = 0; d < plan.directions; ++d) {
    ForwardTask& task = params.direction[d];
    task.given = call.direction[d];
    task.weights = reinterpret_cast<Words*>(free);
    free += weights_bytes(plan);
    task.states = free;
    const size_t bytes = states_bytes(plan, call.extent);
    free += bytes;
    const size_t h_0 = size_t(call.extent.B) * params.states_stride;
    if (bytes > 0)
      if (const char* error = fill(task.states + h_0, kEmpty, bytes - h_0, stream)) return error;
  }
  if (const char* error = pack_forward(plan, params, stream)) return error;
  return launch(forward_kernel(plan), grid_of(plan), stream, params);
}

const char* run(const Plan& plan, const BackwardLaunch& call, void* workspace, Stream stream) {
  BackwardParams params{};
  params.extent = call.extent;
  params.tiling = tiling_of(plan, call.extent.H);
  char* free = static_cast<char*>(workspace);
  const size_t row = size_t(4) * params.tiling.padded * element_bytes(plan.operands);
  for (int d = 0; d < plan.directions; ++d) {
    BackwardTask& task = params.direction[d];
    task.given = call.direction[d];
    task.weights = reinterpret_cast<Words*>(free);
    free += weights_bytes(plan);
    if (const char* error = fill(task.given.dgates, kEmpty, call.extent.N * row, stream))
      return error;
  }
  if (const char* error = pack_backward(plan, params, stream)) return error;
  return launch(backward_kernel(plan), grid_of(plan), stream, params);
}

}  // namespace fused_lstm::cuda
