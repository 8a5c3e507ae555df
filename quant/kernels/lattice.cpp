// IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S, IQ1_S and IQ1_M: codes that index points of a lattice.
#include "lattice.h"

#include "feedback.h"
#include "length.h"
#include "packing.h"

namespace KERNELS_NAMESPACE(INSTRUCTION_SET) {

// Lattices, by the number of the format whose points they are. Levels are those that odd multiples of a step scale.
template <int ID> struct Lattice2 {
    static constexpr int SIZE = 8;
    static constexpr float LEVELS[] = {1, 3.125, 5.375};
    static const LatticePoints& points() { return *LATTICES[ID]; }
};

struct Lattice3XXS {
    static constexpr int SIZE = 4;
    static constexpr float LEVELS[] = {1, 3, 5, 7, 9, 11, 13, 15.5};
    static const LatticePoints& points() { return *LATTICES[18]; }
};

struct Lattice3S {
    static constexpr int SIZE = 4;
    static constexpr float LEVELS[] = {1, 3, 5, 7, 9, 11, 13, 15};
    static const LatticePoints& points() { return *LATTICES[21]; }
};

struct Lattice1 {
    static constexpr int SIZE = 8;
    static constexpr float LEVELS[] = {-1, 0, 1};
    static const LatticePoints& points() { return *LATTICES[19]; }
};

inline Ints looked_up(const uint16_t* table, Ints places) {
    for (int lane = 0; lane < LANES; lane++) places[lane] = table[places[lane]];
    return places;
}

// The eighth sign that goes with seven.
inline Ints with_eighth(Ints signs) {
    Ints parity = signs ^ signs >> 4;
    parity ^= parity >> 2;
    return signs | ((parity ^ parity >> 1) & 1) << 7;
}

// Formats that store signs apart from points, with a scale for each of COUNT sub-blocks. With EVEN signs the number of
// negative ones among eight is even: where it is odd, the value that loses least by it gets the other sign.
//
// Format has join(codes, bytes) and split(bytes, codes).
template <class Format, class Lattice, int COUNT_, bool EVEN> struct Signed {
    using Points = Lattice;
    using Chosen = Format;
    static constexpr int SIZE = 256, COUNT = COUNT_, SUB_BLOCK = 256 / COUNT, LARGEST = 31;
    static constexpr int POINTS = SUB_BLOCK / Lattice::SIZE, ALL_POINTS = 256 / Lattice::SIZE;
    static constexpr float SHIFTS[] = {0}, SPANS[] = {0.92f, 1.12f};
    static constexpr bool SPANNED = true;

    template <bool WEIGHTED>
    static void choose(const Floats* scaled, Weights<WEIGHTED> weights, Floats* levels, Ints* codes) {
        for (int point = 0; point < POINTS; point += 2) {
            int first = point * Lattice::SIZE;
            nearest_points<Lattice, 2>(scaled + first, weights.from(first), codes + point);
        }
        for (int i = 0; i < SUB_BLOCK; i++)
            levels[i] = Halves<Lattice>::level(codes[i / Lattice::SIZE], i % Lattice::SIZE);
    }

    // For choices with error feedback: eight values with their signs.
    static constexpr int GROUP = 8, SUB_BLOCKS = COUNT;

    static void nearest(const Floats* scaled, const Floats* weights, Floats* levels) {
        Floats magnitudes[GROUP];
        Ints pairs[GROUP / Lattice::SIZE], signs = take_signs(scaled, Weights<true>{weights}, magnitudes);
        nearest_points<Lattice, GROUP / Lattice::SIZE>(magnitudes, Weights<true>{weights}, pairs);
        for (int i = 0; i < GROUP; i++) {
            Floats level = Halves<Lattice>::level(pairs[i / Lattice::SIZE], i % Lattice::SIZE);
            levels[i] = (signs >> i & 1) != 0 ? -level : level;
        }
    }

    struct Codes {
        Ints step, scales[COUNT], numbers[ALL_POINTS], signs[32];  // the step as bits of float16; scales are halved
    };

    template <bool WEIGHTED>
    static void encode(const Floats* values, Weights<WEIGHTED> weights, Floats unit, Ints* bytes) {
        Codes codes;
        Floats magnitudes[SIZE];
        for (int group = 0; group < 32; group++)
            codes.signs[group] = take_signs(values + 8 * group, weights.from(8 * group), magnitudes + 8 * group);
        LatticeBlock<Format, WEIGHTED> block(magnitudes, weights, unit);
        Floats step = stored(block.step, unit);
        codes.step = half_of(step * lengthening<256>(magnitudes, weights, step * block.product), unit);
        for (int i = 0; i < COUNT; i++) codes.scales[i] = block.multiples[i];
        for (int i = 0; i < ALL_POINTS; i++) codes.numbers[i] = looked_up(Lattice::points().numbers, block.codes[i]);
        Format::join(codes, bytes);
    }

    static void decode(const Ints* bytes, Floats* values) {
        Codes codes;
        Floats scale[COUNT];
        Format::split(bytes, codes);
        multiply(codes, scale);
        for (int i = 0; i < ALL_POINTS; i++) {
            Ints pair = looked_up(Lattice::points().pairs, codes.numbers[i]);
            for (int j = 0; j < Lattice::SIZE; j++) {
                int place = Lattice::SIZE * i + j;
                Ints sign = codes.signs[place / 8] >> place % 8 << 31;
                values[place] = from_bits(bits(scale[i / POINTS] * Halves<Lattice>::level(pair, j)) ^ sign);
            }
        }
    }

    static void scales(const Ints* bytes, Floats* scale, Floats* minimum) {
        Codes codes;
        Format::split(bytes, codes);
        multiply(codes, scale);
        for (int i = 0; i < COUNT; i++) minimum[i] = all(0.0f);
    }

    static void put_levels(const Floats* levels, Ints* bytes) {
        Codes codes;
        Format::split(bytes, codes);
        for (int i = 0; i < 32; i++) {
            codes.signs[i] = all(0);
            for (int j = 0; j < 8; j++) codes.signs[i] |= (levels[8 * i + j] < 0.0f) & 1 << j;
        }
        for (int i = 0; i < ALL_POINTS; i++) {
            Ints pair = Halves<Lattice>::pair(levels + Lattice::SIZE * i);
            codes.numbers[i] = looked_up(Lattice::points().numbers, pair);
        }
        Format::join(codes, bytes);
    }

  private:
    static void multiply(const Codes& codes, Floats* scale) {
        Floats step = float_from_half(codes.step);
        for (int i = 0; i < COUNT; i++) scale[i] = step * (to_float(codes.scales[i]) * 2.0f + 1.0f);
    }

    template <bool WEIGHTED>
    static Ints take_signs(const Floats* values, Weights<WEIGHTED> weights, Floats* magnitudes) {
        Ints signs = all(0);
        for (int i = 0; i < 8; i++) signs |= (values[i] < 0.0f) & 1 << i;
        if constexpr (EVEN) {
            Ints cheapest = all(INT32_MAX);
            for (int i = 0; i < 8; i++) {
                Ints loss = bits(weights.times(i, magnitude(values[i])));
                cheapest = smaller(cheapest, (loss & ~255) | i);
            }
            Ints odd = (with_eighth(signs & 127) ^ signs) != 0;
            signs ^= odd & all(1) << (cheapest & 255);
        }
        for (int i = 0; i < 8; i++) magnitudes[i] = (signs >> i & 1) != 0 ? -values[i] : values[i];
        return signs;
    }
};


// Four times seven signs and a scale, in four bytes.
inline void pack_word(const Ints* signs, Ints scale, Ints* bytes) {
    Ints word = scale << 28;
    for (int i = 0; i < 4; i++) word |= (signs[i] & 127) << 7 * i;
    for (int i = 0; i < 4; i++) bytes[i] = word >> 8 * i & 255;
}

inline void unpack_word(const Ints* bytes, Ints* signs, Ints& scale) {
    Ints word = bytes[0] | bytes[1] << 8 | bytes[2] << 16 | bytes[3] << 24;
    for (int i = 0; i < 4; i++) signs[i] = with_eighth(word >> 7 * i & 127);
    scale = word >> 28 & 15;
}

// Numbers of four bits, pairs of them in a byte, the first lower.
template <int COUNT> void pack_nibbles(const Ints* numbers, Ints* bytes) {
    for (int i = 0; i < COUNT / 2; i++) bytes[i] = numbers[2 * i] | numbers[2 * i + 1] << 4;
}

template <int COUNT> void unpack_nibbles(const Ints* bytes, Ints* numbers) {
    for (int i = 0; i < COUNT; i++) numbers[i] = bytes[i / 2] >> i % 2 * 4 & 15;
}

struct IQ2_XXS : Signed<IQ2_XXS, Lattice2<16>, 8, true> {
    static constexpr int ID = 16, BYTES = 66;

    static void join(const Codes& codes, Ints* bytes) {
        pack_half(codes.step, bytes);
        for (int i = 0; i < 8; i++) {
            for (int j = 0; j < 4; j++) bytes[2 + 8 * i + j] = codes.numbers[4 * i + j];
            pack_word(codes.signs + 4 * i, codes.scales[i], bytes + 6 + 8 * i);
        }
    }

    static void split(const Ints* bytes, Codes& codes) {
        codes.step = bytes[0] | bytes[1] << 8;
        for (int i = 0; i < 8; i++) {
            for (int j = 0; j < 4; j++) codes.numbers[4 * i + j] = bytes[2 + 8 * i + j];
            unpack_word(bytes + 6 + 8 * i, codes.signs + 4 * i, codes.scales[i]);
        }
    }
};

struct IQ3_XXS : Signed<IQ3_XXS, Lattice3XXS, 8, true> {
    static constexpr int ID = 18, BYTES = 98;

    static void join(const Codes& codes, Ints* bytes) {
        pack_half(codes.step, bytes);
        for (int i = 0; i < 64; i++) bytes[2 + i] = codes.numbers[i];
        for (int i = 0; i < 8; i++) pack_word(codes.signs + 4 * i, codes.scales[i], bytes + 66 + 4 * i);
    }

    static void split(const Ints* bytes, Codes& codes) {
        codes.step = bytes[0] | bytes[1] << 8;
        for (int i = 0; i < 64; i++) codes.numbers[i] = bytes[2 + i];
        for (int i = 0; i < 8; i++) unpack_word(bytes + 66 + 4 * i, codes.signs + 4 * i, codes.scales[i]);
    }
};

struct IQ2_XS : Signed<IQ2_XS, Lattice2<17>, 16, true> {
    static constexpr int ID = 17, BYTES = 74;

    static void join(const Codes& codes, Ints* bytes) {
        pack_half(codes.step, bytes);
        for (int i = 0; i < 32; i++) pack_half(codes.numbers[i] | (codes.signs[i] & 127) << 9, bytes + 2 + 2 * i);
        pack_nibbles<16>(codes.scales, bytes + 66);
    }

    static void split(const Ints* bytes, Codes& codes) {
        codes.step = bytes[0] | bytes[1] << 8;
        for (int i = 0; i < 32; i++) {
            Ints code = bytes[2 + 2 * i] | bytes[3 + 2 * i] << 8;
            codes.numbers[i] = code & 511;
            codes.signs[i] = with_eighth(code >> 9);
        }
        unpack_nibbles<16>(bytes + 66, codes.scales);
    }
};

struct IQ2_S : Signed<IQ2_S, Lattice2<22>, 16, false> {
    static constexpr int ID = 22, BYTES = 82;

    static void join(const Codes& codes, Ints* bytes) {
        pack_half(codes.step, bytes);
        for (int i = 0; i < 32; i++) {
            bytes[2 + i] = codes.numbers[i] & 255;
            bytes[34 + i] = codes.signs[i];
        }
        for (int i = 0; i < 8; i++) {
            bytes[66 + i] = all(0);
            for (int j = 0; j < 4; j++) bytes[66 + i] |= codes.numbers[4 * i + j] >> 8 << 2 * j;
        }
        pack_nibbles<16>(codes.scales, bytes + 74);
    }

    static void split(const Ints* bytes, Codes& codes) {
        codes.step = bytes[0] | bytes[1] << 8;
        for (int i = 0; i < 32; i++) {
            codes.numbers[i] = bytes[2 + i] | (bytes[66 + i / 4] >> i % 4 * 2 & 3) << 8;
            codes.signs[i] = bytes[34 + i];
        }
        unpack_nibbles<16>(bytes + 74, codes.scales);
    }
};

struct IQ3_S : Signed<IQ3_S, Lattice3S, 8, false> {
    static constexpr int ID = 21, BYTES = 110;
    static constexpr float SPANS[] = {1.02f};

    static void join(const Codes& codes, Ints* bytes) {
        pack_half(codes.step, bytes);
        for (int i = 0; i < 64; i++) bytes[2 + i] = codes.numbers[i] & 255;
        for (int i = 0; i < 8; i++) {
            bytes[66 + i] = all(0);
            for (int j = 0; j < 8; j++) bytes[66 + i] |= codes.numbers[8 * i + j] >> 8 << j;
        }
        for (int i = 0; i < 32; i++) bytes[74 + i] = codes.signs[i];
        pack_nibbles<8>(codes.scales, bytes + 106);
    }

    static void split(const Ints* bytes, Codes& codes) {
        codes.step = bytes[0] | bytes[1] << 8;
        for (int i = 0; i < 64; i++) codes.numbers[i] = bytes[2 + i] | (bytes[66 + i / 8] >> i % 8 & 1) << 8;
        for (int i = 0; i < 32; i++) codes.signs[i] = bytes[74 + i];
        unpack_nibbles<8>(bytes + 106, codes.scales);
    }
};

// Formats that shift points up or down by SHIFT, the points of each of PARTS parts of a sub-block alike: the way that
// suits values better when they go to the nearest level by themselves. Codes are pairs, with bit 16 set for down.
template <int COUNT_, int PARTS> struct Shifted {
    using Points = Lattice1;
    static constexpr int SIZE = 256, COUNT = COUNT_, SUB_BLOCK = 256 / COUNT, LARGEST = 15, POINTS = SUB_BLOCK / 8;
    static constexpr float SHIFT = 0.125f, SHIFTS[] = {SHIFT, -SHIFT};
    static constexpr bool SPANNED = false;

    template <bool WEIGHTED>
    static void choose(const Floats* scaled, Weights<WEIGHTED> weights, Floats* levels, Ints* codes) {
        constexpr int EACH = SUB_BLOCK / PARTS;
        Floats shifted[SUB_BLOCK];
        Ints marks[POINTS];
        for (int first = 0; first < SUB_BLOCK; first += EACH) {
            auto distance = [&](float shift) {
                return ordered_sum<EACH>([&](int i) {
                    Floats value = scaled[first + i] - shift, miss = value - rounded(clamp(value, -1, 1));
                    return weights.times(first + i, miss) * miss;
                });
            };
            Ints down = distance(-SHIFT) < distance(SHIFT);
            for (int i = first; i < first + EACH; i++) shifted[i] = scaled[i] - (down ? all(-SHIFT) : all(SHIFT));
            for (int i = first; i < first + EACH; i += 8) marks[i / 8] = down & 1 << 16;
        }
        for (int point = 0; point < POINTS; point += 2)
            nearest_points<Lattice1, 2>(shifted + 8 * point, weights.from(8 * point), codes + point);
        for (int point = 0; point < POINTS; point++) codes[point] |= marks[point];
        for (int i = 0; i < SUB_BLOCK; i++) levels[i] = level(codes[i / 8], i % 8);
    }

    static Ints number(Ints code) { return looked_up(Lattice1::points().numbers, code & 65535) | code >> 16 << 11; }

    // Eight values for a number with bit 11 set for a shift down.
    static void restore(Floats step, Ints scale, Ints number, Floats* values) {
        Ints code = looked_up(Lattice1::points().pairs, number & 2047) | number >> 11 << 16;
        Floats each = step * (to_float(scale) * 2.0f + 1.0f);
        for (int i = 0; i < 8; i++) values[i] = each * level(code, i);
    }

  private:
    static Floats level(Ints code, int i) {
        return Halves<Lattice1>::level(code, i) + (code >= 65536 ? all(-SHIFT) : all(SHIFT));
    }
};

struct IQ1_S : Shifted<8, 1> {
    static constexpr int ID = 19, BYTES = 50;

    template <bool WEIGHTED>
    static void encode(const Floats* values, Weights<WEIGHTED> weights, Floats unit, Ints* bytes) {
        LatticeBlock<IQ1_S, WEIGHTED> block(values, weights, unit);
        pack_half(block.step, bytes);
        for (int i = 0; i < 8; i++) {
            Ints word = block.multiples[i] << 12 | block.codes[4 * i] >> 16 << 15;
            for (int j = 0; j < 4; j++) {
                Ints code = number(block.codes[4 * i + j]);
                bytes[2 + 4 * i + j] = code & 255;
                word |= (code >> 8 & 7) << 3 * j;
            }
            pack_half(word, bytes + 34 + 2 * i);
        }
    }

    static void decode(const Ints* bytes, Floats* values) {
        Floats step = unpack_half(bytes);
        for (int i = 0; i < 32; i++) {
            Ints word = bytes[34 + i / 4 * 2] | bytes[35 + i / 4 * 2] << 8;
            Ints code = bytes[2 + i] | (word >> i % 4 * 3 & 7) << 8 | word >> 15 << 11;
            restore(step, word >> 12 & 7, code, values + 8 * i);
        }
    }
};

struct IQ1_M : Shifted<16, 2> {
    static constexpr int ID = 29, BYTES = 56;

    template <bool WEIGHTED>
    static void encode(const Floats* values, Weights<WEIGHTED> weights, Floats unit, Ints* bytes) {
        LatticeBlock<IQ1_M, WEIGHTED> block(values, weights, unit);
        Ints codes[32], high[32];
        for (int i = 0; i < 32; i++) {
            codes[i] = number(block.codes[i]);
            bytes[i] = codes[i] & 255;
            high[i] = codes[i] >> 8;
        }
        pack_nibbles<32>(high, bytes + 32);
        for (int i = 0; i < 4; i++) {
            Ints word = (block.step >> 4 * i & 15) << 12;
            for (int j = 0; j < 4; j++) word |= block.multiples[4 * i + j] << 3 * j;
            pack_half(word, bytes + 48 + 2 * i);
        }
    }

    static void decode(const Ints* bytes, Floats* values) {
        Ints words[4], high[32], half = all(0);
        unpack_nibbles<32>(bytes + 32, high);
        for (int i = 0; i < 4; i++) {
            words[i] = bytes[48 + 2 * i] | bytes[49 + 2 * i] << 8;
            half |= words[i] >> 12 << 4 * i;
        }
        Floats step = float_from_half(half);
        for (int i = 0; i < 32; i++)
            restore(step, words[i / 8] >> i % 8 / 2 * 3 & 7, bytes[i] | high[i] << 8, values + 8 * i);
    }
};

KERNEL_TABLE(LATTICE,
             choosing_kernel<IQ2_XXS>(), choosing_kernel<IQ2_XS>(), choosing_kernel<IQ2_S>(),
             choosing_kernel<IQ3_XXS>(), choosing_kernel<IQ3_S>(), kernel<IQ1_S>(), kernel<IQ1_M>())

}  // namespace
