// Codes of a few bits in bytes, one byte to a lane.
#pragma once

#include "lanes.h"

namespace KERNELS_NAMESPACE(INSTRUCTION_SET) {

// The codes code(i) of BITS bits into COUNT bytes; code i + COUNT * n lies in byte i above those with smaller n.
template <int BITS, int COUNT, class Code> void pack_each(Code code, Ints* bytes) {
    for (int i = 0; i < COUNT; i++) {
        Ints packed = code(i);
        for (int place = 1; place < 8 / BITS; place++) packed |= code(i + COUNT * place) << BITS * place;
        bytes[i] = packed;
    }
}

template <int BITS, int COUNT> void pack(const Ints* codes, Ints* bytes) {
    pack_each<BITS, COUNT>([=](int i) { return codes[i]; }, bytes);
}

template <int BITS, int COUNT> void unpack(const Ints* bytes, Ints* codes) {
    for (int i = 0; i < COUNT; i++)
        for (int place = 0; place < 8 / BITS; place++)
            codes[i + COUNT * place] = bytes[i] >> BITS * place & ((1 << BITS) - 1);
}

// The fifth bits of 32 codes in 4 bytes, then the lower four in 16.
inline void pack_5_bits(const Ints* codes, Ints* bytes) {
    for (int i = 0; i < 4; i++) {
        bytes[i] = all(0);
        for (int bit = 0; bit < 8; bit++) bytes[i] |= codes[8 * i + bit] >> 4 << bit;
    }
    for (int i = 0; i < 16; i++) bytes[4 + i] = (codes[i] & 15) | (codes[16 + i] & 15) << 4;
}

inline void unpack_5_bits(const Ints* bytes, Ints* codes) {
    unpack<4, 16>(bytes + 4, codes);
    for (int i = 0; i < 32; i++) codes[i] |= (bytes[i / 8] >> i % 8 & 1) << 4;
}

inline void pack_half(Ints half, Ints* bytes) {
    bytes[0] = half & 255;
    bytes[1] = half >> 8 & 255;
}

inline Floats unpack_half(const Ints* bytes) { return float_from_half(bytes[0] | bytes[1] << 8); }

// What formats have in common whose blocks begin with their only scale.
struct OneScale {
    static constexpr int SUB_BLOCKS = 1;

    static void scales(const Ints* bytes, Floats* scale, Floats* minimum) {
        scale[0] = unpack_half(bytes);
        minimum[0] = all(0.0f);
    }
};

}  // namespace
