// A whole decoder block for one new token of each sequence: what `openawq_w4` multiplies, and all between.
//
// x + out(attention(qkv(norm(x)))), and to that down(activation(gate) * up) of its norm; or, where a block has no
// `wide`, out(attention(qkv(x))) alone. Results are rounded to
// the kind of the activations wherever they are stored, which is where PyTorch's operators round them.
#pragma once

#include <cstdlib>

#include "attention.h"
#include "gate.h"
#include "norm.h"
#include "product.h"
#include "rotary.h"

struct Scaling {
    const void* weight;  // null where there is no norm
    int64_t columns;     // of a row: all of a token's channels, or those of a head
    int32_t kind, rounds;
    float offset, epsilon;
};

struct Block {
    Product qkv, out, wide, down;  // `wide` has gate and up
    Scaling first, second, query, keys;
    int64_t heads, groups, size;
    int64_t query_at, keys_at, values_at, gate_at, up_at;  // where they begin in a row of their product
    float scale;
    int32_t activation;
};

struct Token {
    const void *x, *cosines, *sines;  // [batch][channels], and [batch or once][size]
    void *keys, *values;              // of the whole cache, to which this token is added
    const void* mask;
    void* result;
    const int64_t* strides;  // of cosines and sines 1 each; of keys 3, of values 3, of the mask 2
    int64_t batch, length;   // of the cache, this token included
    int32_t kind, digits;
};

extern "C" int openawq_attend(
    const void* query, const void* keys, const void* values, int kind, const void* mask, const int64_t* strides,
    int64_t batch, int64_t heads, int64_t shared, int64_t length, int64_t size, float scale, void* out,
    int threads);

namespace {

// Rows that lie one behind the other, in place or not.
void scale_rows(const Scaling& norm, const void* x, Kind kind, int64_t rows, void* out) {
    const Norm call{x, kind, rows, norm.columns, norm.weight, Kind(norm.kind), norm.offset, norm.epsilon,
                    norm.rounds != 0, out};
    for (int64_t row = 0; row < rows; row++) normalize(call, row);
}

// One block and one token, with what lies between their products.
struct Passage {
    const Block& block;
    const Token& token;
    How how;
    Kind kind = how.kind;
    int64_t width = how.width();
    int64_t batch = token.batch, channels = block.qkv.columns;
    int64_t turned_heads = block.heads + block.groups;
    uint8_t *normed = nullptr, *qkv = nullptr, *turned = nullptr, *attended = nullptr, *hidden = nullptr,
            *wide = nullptr, *activated = nullptr;
    bool failed = false;

    // Gives each of the tensors between the products its place; returns the bytes that all take.
    int64_t lay_out(uint8_t* memory) {
        Parts parts{memory};
        const auto place = [&](uint8_t*& tensor, int64_t columns) {
            tensor = parts.take(batch * columns * width);
        };
        place(normed, channels);
        place(qkv, block.qkv.outputs);
        place(turned, turned_heads * block.size);
        place(attended, block.heads * block.size);
        place(hidden, channels);
        place(wide, block.wide.outputs);
        place(activated, block.down.columns);
        return parts.taken;
    }

    void multiply(const Product& by, const void* x, uint8_t* out) {
        failed |= multiply_by(by, x, batch, out, how);
    }

    // Queries and keys turned, keys and values put into the cache.
    void turn() {
        const int64_t outputs = block.qkv.outputs, size = block.size;
        const int64_t* by = token.strides;
        for (int64_t b = 0; b < batch; b++) {
            uint8_t* row = qkv + b * outputs * width;
            const auto scale_heads = [&](const Scaling& norm, int64_t at, int64_t heads) {
                uint8_t* part = row + at * width;
                if (norm.weight) scale_rows(norm, part, kind, heads * size / norm.columns, part);
            };
            scale_heads(block.query, block.query_at, block.heads);
            scale_heads(block.keys, block.keys_at, block.groups);
        }
        const int64_t last = token.length - 1;
        for (int64_t b = 0; b < batch; b++) {
            const Turn angles(token.cosines, b * by[0], token.sines, b * by[1], kind, int(size));
            for (int64_t head = 0; head < turned_heads; head++) {
                const int64_t key = head - block.heads;  // or a query, below zero
                const int64_t at = key < 0 ? block.query_at + head * size : block.keys_at + key * size;
                rotate(angles, qkv, b * outputs + at, turned, (b * turned_heads + head) * size);
            }
            for (int64_t g = 0; g < block.groups; g++) {
                const int64_t key = b * turned_heads + block.heads + g;
                const int64_t value = b * outputs + block.values_at + g * size;
                uint8_t* keys = static_cast<uint8_t*>(token.keys);
                uint8_t* values = static_cast<uint8_t*>(token.values);
                std::memcpy(keys + (b * by[2] + g * by[3] + last * by[4]) * width, turned + key * size * width,
                            size * width);
                std::memcpy(values + (b * by[5] + g * by[6] + last * by[7]) * width, qkv + value * width,
                            size * width);
            }
        }
    }

    void attend_to_all() {
        const int64_t* by = token.strides;
        const int64_t strides[] = {turned_heads * block.size, block.size, by[2], by[3], by[4],
                                   by[5], by[6], by[7], by[8], by[9]};
        failed |= openawq_attend(
            turned, token.keys, token.values, kind, token.mask, strides, batch, block.heads,
            block.heads / block.groups, token.length, block.size, block.scale, attended, how.threads);
    }

    // out(attention(qkv(x))); `to` may be x.
    void attention(const void* x, uint8_t* to) {
        multiply(block.qkv, x, qkv);
        turn();
        attend_to_all();
        multiply(block.out, attended, to);
    }

    void activate_all() {
        const int64_t outputs = block.wide.outputs, columns = block.down.columns;
        const Gate gate{wide + block.gate_at * width, wide + block.up_at * width, outputs, outputs, kind, columns,
                        Activation(block.activation), activated};
        for (int64_t row = 0; row < batch; row++)
            for (int64_t first = 0; first < columns; first += COLUMNS_AT_ONCE) activate(gate, row, first);
    }
};

void whole_block(Passage& passage) {
    const Block& block = passage.block;
    const Token& token = passage.token;
    const int64_t count = passage.batch * passage.channels;
    scale_rows(block.first, token.x, passage.kind, passage.batch, passage.normed);
    passage.attention(passage.normed, passage.normed);
    add(passage.hidden, token.x, passage.normed, passage.kind, count);
    scale_rows(block.second, passage.hidden, passage.kind, passage.batch, passage.normed);
    passage.multiply(block.wide, passage.normed, passage.wide);
    passage.activate_all();
    passage.multiply(block.down, passage.activated, passage.normed);
    add(token.result, passage.hidden, passage.normed, passage.kind, count);
}

int through(const Block& block, const Token& token, int threads) {
    Passage passage{block, token, {Kind(token.kind), token.digits, threads}};
    uint8_t* memory = static_cast<uint8_t*>(std::malloc(size_t(passage.lay_out(nullptr))));
    if (memory == nullptr) return 1;
    passage.lay_out(memory);
    if (block.wide.codes != nullptr) whole_block(passage);
    else passage.attention(token.x, static_cast<uint8_t*>(token.result));
    std::free(memory);
    return passage.failed;
}

}  // namespace
