// A register of one lane: what a thread of a GPU computes with, and on every CPU the instruction set "scalar", which
// shows without a GPU what one makes of these sources. The names are those of vectors.h, and comparisons too give -1 or 0.
#pragma once

#include <cstdint>
#include <cstring>

namespace KERNELS_NAMESPACE(INSTRUCTION_SET) {

constexpr int LANES = 1;

struct Floats {
    float lane;

    Floats() = default;
    Floats(float value) : lane(value) {}
    float operator[](int) const { return lane; }
    Floats operator-() const { return -lane; }
};

struct Ints {
    int32_t lane;

    Ints() = default;
    Ints(int32_t value) : lane(value) {}
    explicit operator bool() const { return lane != 0; }
    int32_t& operator[](int) { return lane; }
    int32_t operator[](int) const { return lane; }
};

#define KERNELS_ARITHMETIC(op) \
    inline Floats operator op(Floats a, Floats b) { return a.lane op b.lane; }
#define KERNELS_COMPARISON(op)                                                     \
    inline Ints operator op(Floats a, Floats b) { return -int32_t{a.lane op b.lane}; } \
    inline Ints operator op(Ints a, Ints b) { return -int32_t{a.lane op b.lane}; }
// Whole numbers wrap around, as in vector registers.
#define KERNELS_WRAPPING(op) \
    inline Ints operator op(Ints a, Ints b) { return int32_t(uint32_t(a.lane) op uint32_t(b.lane)); }

KERNELS_ARITHMETIC(+)
KERNELS_ARITHMETIC(-)
KERNELS_ARITHMETIC(*)
KERNELS_ARITHMETIC(/)
KERNELS_COMPARISON(<)
KERNELS_COMPARISON(>)
KERNELS_COMPARISON(<=)
KERNELS_COMPARISON(>=)
KERNELS_COMPARISON(==)
KERNELS_COMPARISON(!=)
KERNELS_WRAPPING(+)
KERNELS_WRAPPING(-)
KERNELS_WRAPPING(*)
KERNELS_WRAPPING(&)
KERNELS_WRAPPING(|)
KERNELS_WRAPPING(^)
KERNELS_WRAPPING(<<)

inline Ints operator>>(Ints a, Ints b) { return a.lane >> b.lane; }
inline Ints operator-(Ints a) { return 0 - a; }
inline Ints operator~(Ints a) { return ~a.lane; }
inline Floats& operator+=(Floats& a, Floats b) { return a = a + b; }
inline Ints& operator|=(Ints& a, Ints b) { return a = a | b; }
inline Ints& operator&=(Ints& a, Ints b) { return a = a & b; }
inline Ints& operator^=(Ints& a, Ints b) { return a = a ^ b; }

inline Floats all(float value) { return value; }
inline Ints all(int32_t value) { return value; }

inline Ints bits(Floats value) {
    Ints same;
    std::memcpy(&same, &value, sizeof same);
    return same;
}

inline Floats from_bits(Ints value) {
    Floats same;
    std::memcpy(&same, &value, sizeof same);
    return same;
}

inline Ints truncated(Floats value) { return int32_t(value.lane); }
inline Floats to_float(Ints value) { return float(value.lane); }

inline Ints smaller(Ints a, Ints b) { return a < b ? a : b; }
inline Ints larger(Ints a, Ints b) { return a > b ? a : b; }
inline Floats smaller(Floats a, Floats b) { return a < b ? a : b; }
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

inline bool any(Ints lanes) { return lanes.lane != 0; }
inline void transpose(Ints (&)[LANES]) {}
inline void prefetch(const void*) {}

inline Floats load(const float* from) { return *from; }
inline Ints load_shorts(const uint16_t* from) { return int32_t{*from}; }
inline Ints load_signed_bytes(const uint8_t* from) { return int32_t{int8_t(*from)}; }
inline void store(Floats values, float* to) { *to = values.lane; }
inline void store_shorts(Ints numbers, uint16_t* to) { *to = uint16_t(numbers.lane); }
inline Floats load_some(const float* from, int64_t) { return *from; }
inline void store_some(Floats values, float* to, int64_t) { *to = values.lane; }

}  // namespace
