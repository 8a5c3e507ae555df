// What cuda.cu takes from CUDA, for a C++ compiler: each thread of a grid in turn, one after another.
#include <cstddef>
#include <cstdint>

#define __CUDACC__
#define __global__
#define __device__

struct Place { unsigned x, y; };
static Place blockIdx, blockDim, threadIdx;

inline void atomicMin(unsigned long long* value, unsigned long long other) {
    if (other < *value) *value = other;
}

template <class Kernel> void run_grid(unsigned blocks, unsigned experts, unsigned threads, Kernel kernel) {
    blockDim = {threads, 1};
    for (unsigned expert = 0; expert < experts; expert++)
        for (unsigned block = 0; block < blocks; block++)
            for (unsigned thread = 0; thread < threads; thread++) {
                blockIdx = {block, expert};
                threadIdx = {thread, 0};
                kernel();
            }
}

#include "cuda.cu"

// Arguments as cuLaunchKernel takes them: the place of each.
extern "C" void launch(unsigned blocks, unsigned experts, unsigned threads, void** arguments) {
    run_grid(blocks, experts, threads, [&] {
#if defined(ENCODE)
        encode(*(Rows*)arguments[0], *(int64_t*)arguments[1], *(unsigned long long**)arguments[2]);
#elif defined(DECODE)
        decode(*(const uint8_t**)arguments[0], *(void**)arguments[1], *(int*)arguments[2], *(int64_t*)arguments[3]);
#else
        choose(*(Choosing*)arguments[0], *(unsigned long long**)arguments[1]);
#endif
    });
}
