// The C interface that quant/native.py calls: picks an instruction set, and shares rows among threads.
// Compiled for the oldest processor; the other files, once for each instruction set, run only where there is one.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "kernels.h"
#include "minima.h"

#define FAMILIES_OF(set)                                                                        \
    namespace kernels_##set {                                                                   \
    extern const Kernel AFFINE[], SYMMETRIC[], CODEBOOK[], LATTICE[], MICROFLOAT[], ROUNDING[], \
        TERNARY[];                                                                              \
    const Kernel* const FAMILIES[] = {AFFINE,     SYMMETRIC, CODEBOOK, LATTICE,                 \
                                      MICROFLOAT, ROUNDING,  TERNARY,  nullptr};                \
    }

#ifdef WITH_AVX512
FAMILIES_OF(avx512)
#endif
#ifdef WITH_AVX2
FAMILIES_OF(avx2)
#endif
#ifdef WITH_SCALAR
FAMILIES_OF(scalar)
#endif
FAMILIES_OF(baseline)

const LatticePoints* LATTICES[64];

namespace {

struct InstructionSet {
    const char* name;
    const Kernel* const* families;
    bool usable;
};

#if defined(__x86_64__)
// What processor and system know. By hand, because Clang on Windows has no library behind __builtin_cpu_supports.
struct Processor {
    unsigned basic = 0, extended = 0, saved = 0;  // ECX of leaf 1, EBX of leaf 7, registers that the system saves

    Processor() {
        unsigned a, b, c, d;
        if (__get_cpuid(1, &a, &b, &c, &d)) basic = c;
        if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) extended = b;
        if (has(basic, 1u << 27)) __asm__("xgetbv" : "=a"(saved), "=d"(d) : "c"(0));
    }
    static bool has(unsigned bits, unsigned wanted) { return (bits & wanted) == wanted; }
    bool sse42() const { return has(basic, 1u << 20); }
    bool avx2() const { return has(extended, 1u << 5) && has(saved, 0x6); }
    bool avx512() const { return has(extended, 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31) && has(saved, 0xe6); }
};
#endif

// Best first.
const std::vector<InstructionSet>& instruction_sets() {
#if defined(__x86_64__)
    static const Processor processor;
#endif
    static const std::vector<InstructionSet> sets = {
#if defined(__x86_64__)
#ifdef WITH_AVX512
        {"avx512", kernels_avx512::FAMILIES, processor.avx512()},
#endif
#ifdef WITH_AVX2
        {"avx2", kernels_avx2::FAMILIES, processor.avx2()},
#endif
        {"x86-64-v2", kernels_baseline::FAMILIES, processor.sse42()},
#elif defined(__aarch64__)
        {"neon", kernels_baseline::FAMILIES, true},
#else
        {"vectors", kernels_baseline::FAMILIES, true},
#endif
#ifdef WITH_SCALAR
        {"scalar", kernels_scalar::FAMILIES, true},
#endif
    };
    return sets;
}

const Kernel* find(const char* instruction_set, int id) {
    for (const InstructionSet& set : instruction_sets()) {
        if (!set.usable || std::strcmp(set.name, instruction_set)) continue;
        for (const Kernel* const* family = set.families; *family; family++)
            for (const Kernel* kernel = *family; kernel->decode; kernel++)
                if (kernel->id == id) return kernel;
    }
    return nullptr;
}

constexpr int64_t PIECE = 1 << 16;  // values that a thread takes at once

// Calls work(first, last) for pieces of 0 ... blocks, in rising order, on up to `threads` threads.
template <class Work> void share(int64_t blocks, int block_size, int threads, Work work) {
    const int64_t step = std::max<int64_t>(1, PIECE / block_size);
    std::atomic<int64_t> next{0};
    auto run = [&] {
        for (int64_t first; (first = next.fetch_add(step)) < blocks;) work(first, std::min(first + step, blocks));
    };
    std::vector<std::thread> helpers;
    try {
        for (int64_t i = 1; i < threads && i * step < blocks; i++) helpers.emplace_back(run);
    } catch (const std::system_error&) {
        // The system gives no more threads; those that there are do the work.
    }
    run();
    for (std::thread& helper : helpers) helper.join();
}

// The first bad block, or -1, of what work(first, last) returns for pieces of 0 ... blocks.
template <class Work> int64_t first_bad_of(int64_t blocks, int block_size, int threads, Work work) {
    std::atomic<int64_t> bad{blocks};
    share(blocks, block_size, threads, [&](int64_t first, int64_t last) {
        if (first >= bad) return;
        int64_t found = work(first, last);
        if (found < 0) return;
        for (int64_t known = bad; found < known && !bad.compare_exchange_weak(known, found);) {}
    });
    return bad < blocks ? int64_t{bad} : -1;
}

}  // namespace

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

// The digest of the sources all this was built from.
EXPORT const char* kernels_sources() {
    return SOURCES;
}

// The name of the instruction set at this place among those usable here, best first; null beyond the last.
EXPORT const char* kernels_instruction_set(int place) {
    for (const InstructionSet& set : instruction_sets())
        if (set.usable && place-- == 0) return set.name;
    return nullptr;
}

// 0: no kernel for this format, 1: reads it, 2: writes it too, 3: chooses levels for its scales as well.
EXPORT int kernels_support(const char* instruction_set, int format) {
    const Kernel* kernel = find(instruction_set, format);
    return kernel ? 1 + (kernel->encode != nullptr) + (kernel->choose != nullptr) : 0;
}

// Returns the first row that holds a value that is not finite, or -1. `type` and `weights` as in struct Rows.
EXPORT int64_t kernels_quantize(const char* instruction_set, int format, const void* values, int type,
                                const float* weights, uint8_t* bytes, int64_t rows, int64_t columns, int threads) {
    const Kernel* kernel = find(instruction_set, format);
    const int64_t row_blocks = columns / kernel->block_size;
    const Rows input{values, type, weights, row_blocks, bytes};
    int64_t bad = first_bad_of(rows * row_blocks, kernel->block_size, threads,
                               [&](int64_t first, int64_t last) { return kernel->encode(input, first, last); });
    return bad < 0 ? bad : bad / row_blocks;
}

EXPORT void kernels_dequantize(const char* instruction_set, int format, const uint8_t* bytes, void* values, int type,
                               int64_t blocks, int threads) {
    const Kernel* kernel = find(instruction_set, format);
    share(blocks, kernel->block_size, threads,
          [&](int64_t first, int64_t last) { kernel->decode(bytes, values, type, first, last); });
}

// Returns the first lane that holds a value that is not finite, or -1.
EXPORT int64_t kernels_choose(const char* instruction_set, int format, const Choosing* task, int threads) {
    const Kernel* kernel = find(instruction_set, format);
    return first_bad_of(task->lanes, kernel->block_size, threads,
                        [&](int64_t first, int64_t last) { return kernel->choose(*task, first, last); });
}

// Hands over the points of a format's lattice: the places of their `size` levels, 4 or 8, among `levels` rising ones.
EXPORT void kernels_set_lattice(int format, const uint8_t* digits, int count, int size, int levels) {
    auto* points = new LatticePoints{};
    int halves = 1;
    for (int i = 0; i < size / 2; i++) halves *= levels;
    std::vector<std::vector<int>> partners(halves);  // of each first half, the places of its second halves
    for (int point = 0; point < count; point++) {
        int places[2] = {};
        for (int i = 0; i < size; i++) {
            int digit = digits[point * size + i], half = 2 * i / size;
            places[half] = places[half] * levels + digit;
            points->pairs[point] |= digit << 16 / size * (size - 1 - i);
        }
        points->numbers[points->pairs[point]] = point;
        partners[places[0]].push_back(places[1]);
    }
    SharedMinima(partners, halves, *points);
    LATTICES[format] = points;
}

// What `kernels_set_lattice` has made of a lattice, for kernels elsewhere, and its size in bytes.
EXPORT const void* kernels_lattice(int format, int64_t* size) {
    *size = sizeof(LatticePoints);
    return LATTICES[format];
}
