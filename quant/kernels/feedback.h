// Rounding with error feedback, as quant/rounding/feedback.py explains it: the scales of a block come from the search,
// then its levels are chosen for inputs that go together.
//
// A format that can do this has SUB_BLOCKS, how many scales it has; scales(bytes, scales, minima), what they are;
// put_levels(levels, bytes), which stores other levels for the same scales; and Chosen, a type with GROUP, how many
// values choose their levels together, and nearest(values over their scale, weights, levels), which fills in the
// levels nearest to a group.
#pragma once

#include "tiles.h"

namespace KERNELS_NAMESPACE(INSTRUCTION_SET) {

// Values that choose levels by themselves.
template <class Each> struct Single {
    static constexpr int GROUP = 1;

    static Ints code_of(Floats level) { return Each::code_of(level); }
    static void nearest(const Floats* scaled, const Floats*, Floats* levels) { levels[0] = Each::nearest(scaled[0]); }
};

// Stores levels of a format with a code for each, from Chosen::code_of, which its pack_codes(codes, bytes) takes.
template <class Format> void put_codes(const Floats* levels, Ints* bytes) {
    Ints codes[Format::SIZE];
    for (int i = 0; i < Format::SIZE; i++) codes[i] = Format::Chosen::code_of(levels[i]);
    Format::pack_codes(codes, bytes);
}

template <class Format> class Choice {
  public:
    static constexpr int VECTORS = LANES == 1 ? 1 : 2;  // of lanes at a time, which share what is read of a matrix
    static constexpr int TILE = VECTORS * LANES;

    Choice(const Choosing& task, int64_t first, int64_t count) : task(task), first(first), count(count) {}

    // Returns the first lane that holds a value that is not finite, or -1.
    int64_t run() {
        if (int64_t bad = search(); bad >= 0) return bad;
        in_turn();
        if (task.sweeps > 0) improve_all();
        if (task.sweeps > 1) improve_again();
        for (int v = 0; v < VECTORS && v * LANES < count; v++) store(v);
        return -1;
    }

  private:
    using Levels = typename Format::Chosen;
    static constexpr int SIZE = Format::SIZE, GROUP = Levels::GROUP, SUB_BLOCKS = Format::SUB_BLOCKS;
    static constexpr int BLOCK = 16;  // values that reach others together
#if defined(__AVX512F__) || defined(ONE_LANE)
    static constexpr int ROWS = 8;  // of a matrix at a time: as many sums as there are registers for
#else
    static constexpr int ROWS = 4;
#endif
    using Values = Floats[VECTORS][SIZE];
    using Sums = Floats[VECTORS][BLOCK];

    const Choosing& task;
    int64_t first, count;
    Values values;   // what is wanted, then what is stored
    Values levels;
    Values slope;    // before `improve_all` the errors; half of how the error of outputs changes with each value
    Values changes;  // that slopes of other blocks do not know of yet: before `improve_all`, from what was wanted in turn
    Floats scale[VECTORS][SUB_BLOCKS], minimum[VECTORS][SUB_BLOCKS], inverse[VECTORS][SUB_BLOCKS];
    Ints bytes[VECTORS][4 * words_of(Format::BYTES)];

    int64_t lanes(int v) const { return count - v * LANES < LANES ? count - v * LANES : LANES; }

    void load_added(int64_t start, int64_t lanes, Floats* added) const {
        if (task.type == 0) load_blocks<SIZE>(static_cast<const float*>(task.added), start, lanes, added);
        else load_blocks<SIZE>(static_cast<const Brain*>(task.added), start, lanes, added);
    }

    // Loads values and finds their scales.
    int64_t search() {
        Floats weights[SIZE];
        for (int i = 0; task.search_weights && i < SIZE; i++) weights[i] = all(task.search_weights[i]);
        for (int v = 0; v < VECTORS; v++) {
            int64_t start = v * LANES < count ? first + v * LANES : first;  // a vector without lanes repeats the first
            Floats units[SIZE];
            load_blocks<SIZE>(task.values, start, lanes(v), values[v], task.value_stride);
            if (task.added) {
                load_added(start, lanes(v), units);
                for (int i = 0; i < SIZE; i++) values[v][i] = values[v][i] + units[i];
            }
            for (int i = 0; i < SIZE; i++) units[i] = values[v][i];
            int bad;
            Floats unit = to_unit<SIZE>(units, bad);
            if (bad >= 0) return start + (bad < lanes(v) ? bad : 0);
            for (Ints& byte : bytes[v]) byte = all(0);
            if (task.search_weights) Format::encode(units, Weights<true>{weights}, unit, bytes[v]);
            else Format::encode(units, Weights<false>{nullptr}, unit, bytes[v]);
            Format::scales(bytes[v], scale[v], minimum[v]);
            for (int i = 0; i < SUB_BLOCKS; i++) inverse[v][i] = reciprocal(scale[v][i]);
        }
        return -1;
    }

    // One group after another, each making good what those before it cost.
    void in_turn() {
        for (int block = 0; block < SIZE; block += BLOCK) {
            Sums wanted;
            for (int v = 0; v < VECTORS; v++)
                for (int i = 0; i < BLOCK; i++) wanted[v][i] = values[v][block + i];
            gather(task.carried, slope, block, 0, block, wanted);
            for (int here = 0; here < BLOCK; here += GROUP)
                for (int v = 0; v < VECTORS; v++) {
                    Floats chosen[GROUP], stored[GROUP];
                    nearest(v, block + here, wanted[v] + here, task.first_weights, chosen, stored);
                    for (int i = 0; i < GROUP; i++) {
                        int place = block + here + i;
                        Floats error = values[v][place] - stored[i];
                        slope[v][place] = error;
                        changes[v][place] = stored[i] - wanted[v][here + i];
                        levels[v][place] = chosen[i];
                        values[v][place] = stored[i];
                        spread(task.carried, block, place, error, here + GROUP, BLOCK, wanted[v]);
                    }
                }
        }
    }

    // Changes what makes the error smaller, given all others as they are.
    void improve_all() {
        for (int block = 0; block < SIZE; block += BLOCK) {
            Sums slopes;
            for (auto& each : slopes)
                for (Floats& sum : each) sum = all(0.0f);
            gather(task.slopes, changes, block, block, SIZE, slopes);
            gather(task.metric, changes, block, 0, block, slopes);
            for (int here = 0; here < BLOCK; here += GROUP)
                for (int v = 0; v < VECTORS; v++) {
                    Floats change[GROUP];
                    bool some = improve(v, block + here, slopes[v] + here, change);
                    for (int i = 0; i < GROUP; i++) {
                        changes[v][block + here + i] = change[i];
                        if (some) spread(task.metric, block, block + here + i, change[i], 0, BLOCK, slopes[v]);
                    }
                }
            for (int v = 0; v < VECTORS; v++)
                for (int i = 0; i < BLOCK; i++) slope[v][block + i] = slopes[v][i];
        }
    }

    // The same once more; what is known of the changes of later values is still what they did the first time.
    void improve_again() {
        for (int block = 0; block < SIZE; block += BLOCK) {
            Sums slopes;
            for (int v = 0; v < VECTORS; v++)
                for (int i = 0; i < BLOCK; i++) slopes[v][i] = slope[v][block + i];
            gather(task.metric, changes, block, 0, block, slopes);
            gather(task.metric, changes, block, block + BLOCK, SIZE, slopes);
            for (int here = 0; here < BLOCK; here += GROUP)
                for (int v = 0; v < VECTORS; v++) {
                    Floats change[GROUP];
                    bool some = improve(v, block + here, slopes[v] + here, change);
                    for (int i = 0; i < GROUP; i++) {
                        int place = block + here + i;
                        changes[v][place] = change[i];
                        if (some) spread(task.metric, block, place, change[i], here + GROUP, BLOCK, slopes[v]);
                    }
                }
        }
    }

    void nearest(int v, int here, const Floats* wanted, const float* weights, Floats* chosen, Floats* stored) const {
        Floats scaled[GROUP], weight[GROUP];
        int sub_block = here * SUB_BLOCKS / SIZE;
        for (int i = 0; i < GROUP; i++) {
            scaled[i] = (wanted[i] + minimum[v][sub_block]) * inverse[v][sub_block];
            weight[i] = all(weights[here + i]);
        }
        Levels::nearest(scaled, weight, chosen);
        for (int i = 0; i < GROUP; i++) stored[i] = scale[v][sub_block] * chosen[i] - minimum[v][sub_block];
    }

    // Whether any lane of a group changes, and by how much.
    bool improve(int v, int here, const Floats* slopes, Floats* change) {
        Floats wanted[GROUP], chosen[GROUP], changed[GROUP], gain = all(0.0f);
        for (int i = 0; i < GROUP; i++)
            wanted[i] = values[v][here + i] - slopes[i] * (1 / task.weights[here + i]);
        nearest(v, here, wanted, task.weights, chosen, changed);
        for (int i = 0; i < GROUP; i++) change[i] = changed[i] - values[v][here + i];
        for (int i = 0; i < GROUP; i++) {
            Floats sum = 2.0f * slopes[i];
            for (int j = 0; j < GROUP; j++) sum = sum + task.metric[(here + i) * SIZE + here + j] * change[j];
            gain = gain - change[i] * sum;
        }
        Ints better = gain > 0.0f;
        for (int i = 0; i < GROUP; i++) {
            levels[v][here + i] = better ? chosen[i] : levels[v][here + i];
            values[v][here + i] = better ? changed[i] : values[v][here + i];
            change[i] = better ? change[i] : all(0.0f);
        }
        return any(better);
    }

    // Adds to the sums of a block the products of its rows of a matrix with `factors`, from `begin` to `end` of them.
    static void gather(const float* matrix, const Values& factors, int block, int begin, int end, Sums& sums) {
        for (int first = 0; first < BLOCK; first += ROWS) {
            const float* rows = matrix + (block + first) * SIZE;
            Floats parts[VECTORS][ROWS];
            for (int v = 0; v < VECTORS; v++)
                for (int i = 0; i < ROWS; i++) parts[v][i] = sums[v][first + i];
            for (int place = begin; place < end; place++)
                for (int i = 0; i < ROWS; i++)
                    for (int v = 0; v < VECTORS; v++)
                        parts[v][i] = parts[v][i] + rows[i * SIZE + place] * factors[v][place];
            for (int v = 0; v < VECTORS; v++)
                for (int i = 0; i < ROWS; i++) sums[v][first + i] = parts[v][i];
        }
    }

    // Adds what one value makes of sums `begin` to `end` of its block.
    static void spread(const float* matrix, int block, int place, Floats factor, int begin, int end, Floats* sums) {
        for (int i = begin; i < end; i++) sums[i] = sums[i] + matrix[(block + i) * SIZE + place] * factor;
    }

    void store(int v) {
        int64_t start = first + v * LANES;
        Format::put_levels(levels[v], bytes[v]);
        store_bytes<Format::BYTES>(bytes[v], task.bytes + start * Format::BYTES, lanes(v));
        Floats errors[SIZE];
        load_blocks<SIZE>(task.values, start, lanes(v), errors, task.value_stride);
        for (int i = 0; i < SIZE; i++) errors[i] = errors[i] - values[v][i];
        if (task.type == 0) store_errors(errors, static_cast<float*>(task.errors), start, lanes(v));
        else store_errors(errors, static_cast<Brain*>(task.errors), start, lanes(v));
    }

    template <class Output> void store_errors(const Floats* errors, Output* to, int64_t start, int64_t lanes) const {
        store_values<SIZE>(errors, to + start * task.error_stride, lanes, task.error_stride);
    }
};

template <class Format> int64_t choose(const Choosing& task, int64_t first, int64_t last) {
    constexpr int TILE = Choice<Format>::TILE;
    for (; first < last; first += TILE) {
        Choice<Format> choice(task, first, last - first < TILE ? last - first : TILE);
        if (int64_t bad = choice.run(); bad >= 0) return bad;
    }
    return -1;
}

template <class Format> constexpr Kernel choosing_kernel() {
    Kernel made = kernel<Format>();
    made.choose = choose<Format>;
    return made;
}

}  // namespace
