// MXFP4 and NVFP4: codes that are 4-bit floats.
#include "packing.h"
#include "side_by_side.h"

namespace KERNELS_NAMESPACE(INSTRUCTION_SET) {

// E2M1 of the OCP microscaling specification, doubled to whole numbers: 0, 1, 2, 3, 4, 6, 8 and 12, and a sign.
struct Microfloat {
    // The level nearest to a magnitude.
    static Floats nearest(Floats positive) {
        // Added to this, a magnitude is rounded to a multiple of the distance between levels: 1 below 4, 2 below 8.
        Floats whole = from_bits(larger(bits(positive) & 0x7f800000, bits(all(2.0f))) + (22 << 23));
        return smaller((positive + whole) - whole, all(12.0f));
    }

    // The code of the level nearest to a magnitude, or a larger one if that is above the last. A code is the upper bits
    // of a float, once magnitudes below 2 are brought between 1 and 2, where floats with a single bit of mantissa are two,
    // as the levels below 2 are; so it takes no more than to round bits.
    static Ints unlimited_code(Floats positive) {
        Floats normal = larger(positive, positive * 0.5f + 1.0f);
        return (bits(normal) - (bits(all(1.0f)) - (1 << 21))) >> 22;
    }

    // Minus zero, 8, is never written.
    static Ints code(Floats values) {
        Ints code = smaller(unlimited_code(magnitude(values)), all(7));
        return code | (bits(values) >> 28 & -code & 8);
    }

    static Floats decoded(Ints codes) {
        Ints code = codes & 7;
        Floats level = code < 2 ? to_float(code) : from_bits((code + 254) << 22);
        return codes > 8 ? -level : level;
    }
};

struct MXFP4 {
    static constexpr int ID = 39, SIZE = BLOCK, BYTES = 17;

    static int64_t encode(const Rows& rows, int64_t first, int64_t last) {
        switch (rows.type) {
            case 0: return encode_values(static_cast<const float*>(rows.values), rows, first, last);
            case 1: return encode_values(static_cast<const Half*>(rows.values), rows, first, last);
            default: return encode_values(static_cast<const Brain*>(rows.values), rows, first, last);
        }
    }

    static void decode(const Ints* bytes, Floats* values) {
        Ints exponent = bytes[0];  // of the scale of undoubled levels; 2^-128 and 2^-127 are subnormal
        Floats scale = from_bits(exponent < 2 ? all(0x00200000) << exponent : (exponent - 1) << 23);
        Ints codes[32];
        unpack<4, 16>(bytes + 1, codes);
        for (int i = 0; i < 32; i++) values[i] = scale * Microfloat::decoded(codes[i]);
    }

  private:
    static constexpr float MOST_LEVELS = 6.25f;  // up to here a magnitude loses nothing to the lower exponent

    template <class Input>
    static int64_t encode_values(const Input* values, const Rows& rows, int64_t first, int64_t last) {
        for (; first < last; first += LANES) {
            int64_t count = last - first < LANES ? last - first : LANES;
            const Input* from = values + first * BLOCK;
            Ints largest = largest_of(from, count);
            if (int bad = first_bad(largest); bad >= 0) return first + bad;
            Ints exponent = rows.weights ? search(from, rows, first, count, largest) : exponent_of(largest, 7.25f);
            Floats inverse = inverse_of(exponent);
            for (int block = 0; block < count; block++)
                write(from + block * BLOCK, inverse[block], exponent[block], rows.bytes + (first + block) * BYTES);
        }
        return -1;
    }

    // The exponent that puts the peak between 4 and 8 (6 is the top), or one more if it is then above `most`, from 4 to
    // 8. Exponent 0, a subnormal scale, is not used.
    static Ints exponent_of(Ints largest, float most) {
        Floats unit = unit_of(largest);
        Ints above = from_bits(largest) > unit * (most / 4);
        return larger((bits(unit) >> 23) - 2 - above, all(1));
    }

    // The exponent that puts the peak between 7 and 14, or one more if that is better.
    template <class Input>
    static Ints search(const Input* values, const Rows& rows, int64_t first, int64_t count, Ints largest) {
        Ints exponent = larger(exponent_of(largest, 7.0f) - 1, all(1));
        Floats inverse = inverse_of(exponent) * 0.5f, costs[LANES][8 / LANES] = {};
        Floats peak = from_bits(largest) * inverse;
        int64_t column = first % rows.blocks;
        for (int block = 0; block < count; block++) {
            // Without an excess, as in five blocks of six, no cost is above zero.
            for (int i = 0; i < VECTORS && peak[block] > MOST_LEVELS; i++) {
                Floats positive = magnitude(load(values + block * BLOCK + i * LANES) * all(inverse[block]));
                costs[block][i % (8 / LANES)] += load(rows.weights + column * BLOCK + i * LANES) * cost(positive);
            }
            column = column + 1 < rows.blocks ? column + 1 : 0;
        }
        return exponent - (sum_of(costs) > 0.0f);
    }

    // How much larger a squared error is than with an exponent one higher, as quant/codebook.py explains it.
    static Floats cost(Floats positive) {
        Floats excess = larger(positive, all(MOST_LEVELS)) - MOST_LEVELS;
        return excess * excess - larger(0.25f - magnitude(magnitude(positive - 1.0f) - 0.5f), all(0.0f));
    }

    // 1 over what a doubled level is worth under an exponent.
    static Floats inverse_of(Ints exponent) { return from_bits((255 - exponent) << 23); }

    template <class Input> static void write(const Input* values, float inverse, int exponent, uint8_t* to) {
        Ints codes[VECTORS], signs[VECTORS];
        for (int i = 0; i < VECTORS; i++) {
            Floats scaled = load(values + i * LANES) * inverse;
            codes[i] = Microfloat::unlimited_code(magnitude(scaled));
            signs[i] = bits(scaled) >> 31;
        }
        to[0] = exponent;
        write_codes(codes, signs, to + 1);
    }

#if defined(ONE_LANE)
    static void write_codes(const Ints* codes, const Ints* signs, uint8_t* to) {
        auto signed_code = [&](int i) {
            Ints code = smaller(codes[i], 7);
            return code | ((code > 0) & signs[i] & 8);
        };
        for (int i = 0; i < BLOCK / 2; i++) to[i] = (signed_code(i) | signed_code(i + BLOCK / 2) << 4)[0];
    }
#else
    static void write_codes(const Ints* codes, const Ints* signs, uint8_t* to) {
        typedef uint8_t Packed __attribute__((vector_size(BLOCK / 2)));
        BlockOfBytes code, sign;
        narrow(codes, code);
        narrow(signs, sign);
        code = code > 7 ? 7 : code;
        code |= (code > 0) & sign & 8;
        Packed halves[2];
        std::memcpy(halves, &code, sizeof code);
        Packed packed = halves[0] | halves[1] << 4;
        std::memcpy(to, &packed, sizeof packed);
    }
#endif
};

// Sub-blocks of 16 values whose scales are in E4M3 without a sign. Scales are absolute: magnitudes above 2688 saturate,
// and those below 2^-11 vanish.
struct NVFP4 {
    static constexpr int ID = 40, SIZE = 64, BYTES = 36;

    template <bool WEIGHTED>
    static void encode(const Floats* values, Weights<WEIGHTED> weights, Floats unit, Ints* bytes) {
        for (int i = 0; i < SIZE; i += 16) {
            Ints scale_code = search(values + i, weights.from(i), unit);
            Floats inverse = unit * (1.0f / scale_of(scale_code));
            bytes[i / 16] = scale_code;
            auto code = [&](int j) { return Microfloat::code(clamp(values[i + j] * inverse, -12, 12)); };
            pack_each<4, 8>(code, bytes + 4 + i / 2);
        }
    }

    static void decode(const Ints* bytes, Floats* values) {
        for (int i = 0; i < SIZE; i += 16) {
            Ints codes[16];
            unpack<4, 8>(bytes + 4 + i / 2, codes);
            Floats scale = bytes[i / 16] == 127 ? all(0.0f) : scale_of(bytes[i / 16]);  // 127 would be NaN
            for (int j = 0; j < 16; j++) values[i + j] = scale * Microfloat::decoded(codes[j]);
        }
    }

  private:
    // The best of a few scales near the one that puts the peak at the top level: 8 apart, they differ by half.
    template <bool WEIGHTED> static Ints search(const Floats* values, Weights<WEIGHTED> weights, Floats unit) {
        constexpr int steps[] = {0, 4, 1, 3, -1, 5, 2, -2, 6, -3, 7};
        Floats spanning = smaller(from_bits(largest_bits<16>(values)) * float(1.0 / 6) * unit, all(448.0f));
        Ints normal = (bits(spanning) >> 20) - (120 << 3);
        Ints first = spanning < 0x1p-6f ? truncated(spanning * 0x1p9f) : normal, best = all(0);
        Floats inverse_unit = 1.0f / unit;
        Best gains;
        for (int step : steps) {
            Ints code = smaller(larger(first + step, all(1)), all(126));
            Floats scale = scale_of(code), inverse = unit * (1.0f / scale), of_unit = scale * inverse_unit;
            Ints better = gains.improved_by(-ordered_sum<16>([&](int i) {
                Floats positive = magnitude(values[i]), scaled = smaller(positive * inverse, all(12.0f));
                Floats miss = Microfloat::nearest(scaled) * of_unit - positive;
                return weights.times(i, miss) * miss;
            }));
            best = better ? code : best;
        }
        return best;
    }

    // What a doubled level is worth.
    static Floats scale_of(Ints code) {
        Ints exponent = code >> 3 & 15, mantissa = code & 7;
        Floats normal = from_bits((exponent + 120) << 23 | mantissa << 20);
        return (exponent > 0 ? normal : to_float(mantissa) * 0x1p-9f) * 0.5f;
    }
};

template <> inline int64_t encode<MXFP4>(const Rows& rows, int64_t first, int64_t last) {
    return MXFP4::encode(rows, first, last);
}

KERNEL_TABLE(MICROFLOAT, kernel<MXFP4>(), kernel<NVFP4>())

}  // namespace
