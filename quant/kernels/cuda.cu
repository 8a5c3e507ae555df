// The kernels on a GPU, one block to a thread: NVRTC compiles this file at run time for one format (FORMAT) and one thing
// to do with it (ENCODE, DECODE or CHOOSE), see quant/formats/nvrtc.py. Experts lie one after another in memory, and
// each has a row of the grid.
#define INSTRUCTION_SET cuda
#define ONE_LANE

#include "affine.cpp"
#include "codebook.cpp"
#include "lattice.cpp"
#include "microfloat.cpp"
#include "rounding.cpp"
#include "symmetric.cpp"
#include "ternary.cpp"

using kernels_cuda::FORMAT;

const LatticePoints* LATTICES[64];

extern "C" __global__ void set_lattice(int format, const LatticePoints* points) { LATTICES[format] = points; }

inline int64_t place_in_grid() { return blockIdx.x * int64_t{blockDim.x} + threadIdx.x; }

#if defined(ENCODE)
// `blocks` of each expert; `bad` becomes the first block of all that holds a value that is not finite.
extern "C" __global__ void encode(Rows rows, int64_t blocks, unsigned long long* bad) {
    int64_t block = place_in_grid(), before = blockIdx.y * blocks;
    if (block >= blocks) return;
    rows.values = static_cast<const uint8_t*>(rows.values) + before * FORMAT::SIZE * (rows.type == 0 ? 4 : 2);
    rows.bytes += before * FORMAT::BYTES;
    if (rows.weights) rows.weights += blockIdx.y * rows.blocks * FORMAT::SIZE;
    if (kernels_cuda::encode<FORMAT>(rows, block, block + 1) >= 0) atomicMin(bad, before + block);
}
#elif defined(DECODE)
extern "C" __global__ void decode(const uint8_t* bytes, void* values, int type, int64_t blocks) {
    int64_t block = place_in_grid();
    if (block < blocks) kernels_cuda::decode<FORMAT>(bytes, values, type, block, block + 1);
}
#elif defined(CHOOSE)
// `bad` as for `encode`, by lanes of all experts.
extern "C" __global__ void choose(Choosing task, unsigned long long* bad) {
    constexpr int64_t SIZE = FORMAT::SIZE;
    int64_t lane = place_in_grid(), expert = blockIdx.y, before = expert * task.lanes;
    if (lane >= task.lanes) return;
    int bytes = task.type == 0 ? 4 : 2;
    task.values += before * task.value_stride;
    if (task.added) task.added = static_cast<const uint8_t*>(task.added) + before * SIZE * bytes;
    if (task.search_weights) task.search_weights += expert * SIZE;
    task.carried += expert * SIZE * SIZE;
    task.slopes += expert * SIZE * SIZE;
    task.metric += expert * SIZE * SIZE;
    task.first_weights += expert * SIZE;
    task.weights += expert * SIZE;
    task.bytes += before * FORMAT::BYTES;
    task.errors = static_cast<uint8_t*>(task.errors) + before * task.error_stride * bytes;
    if (kernels_cuda::choose<FORMAT>(task, lane, lane + 1) >= 0) atomicMin(bad, before + lane);
}
#endif
