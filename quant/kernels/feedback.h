// The choice of levels for blocks whose scales are chosen, when inputs go together, as quant/feedback.py explains it.
//
// Levels are a type with GROUP, how many values choose theirs together, and nearest(values over their scale, weights,
// levels), which fills in the levels nearest to a group.
#pragma once

#include "tiles.h"

namespace KERNELS_NAMESPACE(INSTRUCTION_SET) {

// Values that choose levels by themselves.
template <class Each> struct Single {
    static constexpr int GROUP = 1;

    static void nearest(const Floats* scaled, const Floats*, Floats* levels) { levels[0] = Each::nearest(scaled[0]); }
};

template <class Levels, int SIZE> class Choice {
  public:
    Choice(const Choosing& task, int64_t first, int64_t count) : task(task), first(first), count(count) {
        for (int i = 0; i < SIZE; i++) target[i] = slope[i] = row(task.target, i);
        for (int i = 0; i < task.sub_blocks; i++) {
            scale[i] = row(task.scales, i);
            minimum[i] = row(task.minima, i);
            inverse[i] = reciprocal(scale[i]);
        }
    }

    // One group after another, each making good what those before it cost.
    void in_turn() {
        Floats* wanted = slope;
        for (int block = 0; block < SIZE; block += BLOCK) {
            Changes errors;
            for (int here = block; here < block + BLOCK; here += GROUP) {
                nearest(here, wanted + here, task.first_weights, levels + here, stored + here);
                for (int i = here; i < here + GROUP; i++) errors.add(i, target[i] - stored[i]);
                spread(errors, errors.count - GROUP, task.carried, wanted, here + GROUP, block + BLOCK);
            }
            spread(errors, 0, task.carried, wanted, block + BLOCK, SIZE);
        }
        for (int i = 0; i < SIZE; i++) slope[i] = all(0.0f);
        for (int block = 0; block < SIZE; block += BLOCK) {
            Changes errors;
            for (int i = block; i < block + BLOCK; i++) errors.add(i, stored[i] - target[i]);
            spread(errors, 0, task.metric, slope, 0, SIZE);
        }
    }

    // Changes what makes the error smaller, given all others as they are.
    void improve() {
        for (int block = 0; block < SIZE; block += BLOCK) {
            Changes changes;
            for (int here = block; here < block + BLOCK; here += GROUP) {
                int before = changes.count;
                improve(here, changes);
                spread(changes, before, task.metric, slope, block, block + BLOCK);
            }
            spread(changes, 0, task.metric, slope, 0, block);
            spread(changes, 0, task.metric, slope, block + BLOCK, SIZE);
        }
    }

    void store_all() const {
        for (int i = 0; i < SIZE; i++) {
            store_row(levels[i], task.levels, i);
            store_row(stored[i], task.stored, i);
        }
    }

  private:
    static constexpr int GROUP = Levels::GROUP, MOST_SUB_BLOCKS = 16;
    static constexpr int BLOCK = 16;  // values whose changes reach the others together

    struct Changes {
        int count = 0, places[BLOCK];
        Floats sizes[BLOCK];

        void add(int place, Floats size) {
            places[count] = place;
            sizes[count++] = size;
        }
    };

    const Choosing& task;
    int64_t first, count;
    Floats target[SIZE], levels[SIZE], stored[SIZE];
    Floats slope[SIZE];  // half of how the error changes with each value; before that, what each value should be
    Floats scale[MOST_SUB_BLOCKS], minimum[MOST_SUB_BLOCKS], inverse[MOST_SUB_BLOCKS];

    void nearest(int here, const Floats* wanted, const float* weights, Floats* chosen, Floats* values) const {
        Floats scaled[GROUP], weight[GROUP];
        int sub_block = here * task.sub_blocks / SIZE;
        for (int i = 0; i < GROUP; i++) {
            scaled[i] = (wanted[i] + minimum[sub_block]) * inverse[sub_block];
            weight[i] = all(weights[here + i]);
        }
        Levels::nearest(scaled, weight, chosen);
        for (int i = 0; i < GROUP; i++) values[i] = scale[sub_block] * chosen[i] - minimum[sub_block];
    }

    void improve(int here, Changes& changes) {
        Floats wanted[GROUP], chosen[GROUP], changed[GROUP], change[GROUP], gain = all(0.0f);
        for (int i = 0; i < GROUP; i++)
            wanted[i] = stored[here + i] - slope[here + i] * (1 / task.metric[(here + i) * (SIZE + 1)]);
        nearest(here, wanted, task.weights, chosen, changed);
        for (int i = 0; i < GROUP; i++) change[i] = changed[i] - stored[here + i];
        for (int i = 0; i < GROUP; i++) {
            Floats sum = 2.0f * slope[here + i];
            for (int j = 0; j < GROUP; j++) sum = sum + task.metric[(here + i) * SIZE + here + j] * change[j];
            gain = gain - change[i] * sum;
        }
        Ints better = gain > 0.0f;
        if (!any(better)) return;
        for (int i = 0; i < GROUP; i++) {
            levels[here + i] = better ? chosen[i] : levels[here + i];
            stored[here + i] = better ? changed[i] : stored[here + i];
            changes.add(here + i, better ? change[i] : all(0.0f));
        }
    }

    // Adds to sums[first] ... sums[last - 1] what changes, those from `begin` on, make of them: products with the rows
    // of a matrix. Several sums at a time stay in registers.
    static void spread(const Changes& changes, int begin, const float* matrix, Floats* sums, int first, int last) {
        for (; first + WIDE <= last; first += WIDE) spread<WIDE>(changes, begin, matrix, sums, first);
        for (; first < last; first++) spread<1>(changes, begin, matrix, sums, first);
    }

    static constexpr int WIDE = 8;

    template <int WIDTH>
    static void spread(const Changes& changes, int begin, const float* matrix, Floats* sums, int first) {
        Floats parts[WIDTH];
        for (int i = 0; i < WIDTH; i++) parts[i] = sums[first + i];
        for (int change = begin; change < changes.count; change++) {
            const float* factors = matrix + first * SIZE + changes.places[change];
            for (int i = 0; i < WIDTH; i++) parts[i] = parts[i] + factors[i * SIZE] * changes.sizes[change];
        }
        for (int i = 0; i < WIDTH; i++) sums[first + i] = parts[i];
    }

    Floats row(const float* rows, int i) const {
        return load_some(rows + i * task.lanes + first, count);
    }

    void store_row(Floats values, float* rows, int i) const {
        store_some(values, rows + i * task.lanes + first, count);
    }
};

template <class Levels, int SIZE> void choose(const Choosing& task, int64_t first, int64_t last) {
    for (; first < last; first += LANES) {
        Choice<Levels, SIZE> choice(task, first, last - first < LANES ? last - first : LANES);
        choice.in_turn();
        for (int sweep = 0; sweep < task.sweeps; sweep++) choice.improve();
        choice.store_all();
    }
}

// A format's levels, by which values choose, are its type Chosen.
template <class Format> constexpr Kernel choosing_kernel() {
    Kernel made = kernel<Format>();
    made.choose = choose<typename Format::Chosen, Format::SIZE>;
    return made;
}

}  // namespace
