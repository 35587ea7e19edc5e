// A layer of experts for a few tokens: those that each was sent to, one after another.
//
// The sum of share * down(activation(gate(x)) * up(x)), in the order of the experts. What is stored between is
// rounded to the kind of the activations, which is where PyTorch's operators round it.
#pragma once

#include <cstdlib>

#include "gate.h"
#include "product.h"

struct Expert {
    Product gate, up, down;
};

struct Routed {
    const void* x;          // [tokens][channels]
    const int64_t* chosen;  // [tokens][each], numbers of experts
    const void* shares;     // [tokens][each]
    const int64_t* hit;     // [hits], the experts that are among them, in order
    void* result;           // [tokens][channels], of zeros
    int64_t tokens, each, hits;
    int32_t kind, share_kind, digits, activation;
};

namespace {

// to += share * row, where products and sums are rounded.
void add_share(void* to, uint8_t* row, const void* shares, int64_t at, const Routed& call, int64_t count) {
    constexpr int PART = 256;
    alignas(64) float values[PART], share[8];
    const Kind kind = Kind(call.kind), share_kind = Kind(call.share_kind);
    const int64_t width = share_kind == FLOAT32 ? 4 : 2;
    uint8_t alone[32] = {};
    std::memcpy(alone, static_cast<const uint8_t*>(shares) + at * width, width);
    read(share, alone, 0, share_kind, 8);
    for (int64_t i = 0; i < count; i += PART) {
        const int n = int(count - i < PART ? count - i : PART);
        read(values, row, i, kind, n);
        for (int k = 0; k < n; k++) values[k] *= share[0];
        write(row, i, values, kind, n);
    }
    add(to, to, row, kind, count);
}

int through_experts(const Expert* experts, const Routed& call, int threads) {
    const How how{Kind(call.kind), call.digits, threads};
    const Expert& any = experts[call.hit[0]];
    const int64_t channels = any.down.outputs, inside = any.down.columns, most = call.tokens * call.each;
    const int64_t width = how.width();
    uint8_t *rows, *gates, *ups, *outs;
    const auto lay_out = [&](uint8_t* memory) {
        Parts parts{memory};
        rows = parts.take(most * channels * width);
        gates = parts.take(most * inside * width);
        ups = parts.take(most * inside * width);
        outs = parts.take(most * channels * width);
        return parts.taken;
    };
    uint8_t* memory = static_cast<uint8_t*>(std::malloc(size_t(lay_out(nullptr))));
    if (memory == nullptr) return 1;
    lay_out(memory);
    bool failed = false;
    for (int64_t h = 0; h < call.hits && !failed; h++) {
        const Expert& expert = experts[call.hit[h]];
        int64_t count = 0;
        const auto each_choice = [&](auto&& use) {
            for (int64_t i = 0; i < most; i++)
                if (call.chosen[i] == call.hit[h]) use(i);
        };
        each_choice([&](int64_t i) {
            const uint8_t* from = static_cast<const uint8_t*>(call.x) + i / call.each * channels * width;
            std::memcpy(rows + count++ * channels * width, from, channels * width);
        });
        failed |= multiply_by(expert.gate, rows, count, gates, how);
        failed |= multiply_by(expert.up, rows, count, ups, how);
        const Gate gate{gates, ups, inside, inside, how.kind, inside, Activation(call.activation), gates};
        for (int64_t row = 0; row < count; row++)
            for (int64_t first = 0; first < inside; first += COLUMNS_AT_ONCE) activate(gate, row, first);
        failed |= multiply_by(expert.down, gates, count, outs, how);
        count = 0;
        each_choice([&](int64_t i) {
            uint8_t* to = static_cast<uint8_t*>(call.result) + i / call.each * channels * width;
            add_share(to, outs + count++ * channels * width, call.shares, i, call, channels);
        });
    }
    std::free(memory);
    return failed;
}

}  // namespace
