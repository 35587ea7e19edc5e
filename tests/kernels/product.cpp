// The library's functions without Python, for processors that only an emulator has: cases from standard input,
// products and recovered codes to standard output.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

extern "C" {
int openawq_start(void*);
int openawq_w4(
    const void*, int64_t, int, int64_t, int64_t, int64_t, const void*, const void*, int, const void*, int64_t,
    int, void*, int, int);
void openawq_norm(
    const void*, int, int64_t, int64_t, const void*, int, float, float, int, void*, int);
int openawq_attend(
    const void*, const void*, const void*, int, const void*, const int64_t*, int64_t, int64_t, int64_t, int64_t,
    int64_t, float, void*, int);
void openawq_pack(const uint8_t*, int64_t, int64_t, int, uint8_t*, int);
void openawq_unpack(const uint8_t*, int64_t, int64_t, int, uint8_t*, int);
}

static std::vector<uint8_t> take(int64_t bytes) {
    std::vector<uint8_t> content(bytes);
    if (std::fread(content.data(), 1, bytes, stdin) != size_t(bytes)) std::exit(3);
    return content;
}

static void give(const std::vector<uint8_t>& content) {
    std::fwrite(content.data(), 1, content.size(), stdout);
}

static int64_t width(int64_t kind) { return kind == 0 ? 4 : 2; }

// x [rows][columns] and a weight of one kind; no rounding in between.
static void norm(int64_t rows, int64_t columns, int64_t kind) {
    const auto x = take(rows * columns * width(kind)), weight = take(columns * width(kind));
    std::vector<uint8_t> out(x.size());
    openawq_norm(x.data(), int(kind), rows, columns, weight.data(), int(kind), 1, 1e-5f, 0, out.data(), 1);
    give(out);
}

// Two query heads to each of two heads of keys and values, and a mask.
static void attention(int64_t length, int64_t size, int64_t kind) {
    const auto query = take(4 * size * width(kind));
    const auto keys = take(2 * length * size * width(kind)), values = take(keys.size()), mask = take(length);
    const int64_t row = length * size, strides[] = {0, size, 0, row, size, 0, row, size, 0, 1};
    std::vector<uint8_t> out(query.size());
    if (openawq_attend(
            query.data(), keys.data(), values.data(), int(kind), mask.data(), strides, 1, 4, 2, length, size,
            0.2f, out.data(), 1))
        std::exit(2);
    give(out);
}

int main() {
    if (openawq_start(nullptr)) return 1;
    struct {
        int64_t rows, columns, outputs, group, x_kind, scale_kind, planes, digits;
    } of;
    while (std::fread(&of, sizeof(of), 1, stdin) == 1) {
        if (of.outputs == 0) {  // not a product
            norm(of.rows, of.columns, of.x_kind);
            attention(of.rows, of.columns, of.x_kind);
            continue;
        }
        const int64_t groups = of.columns / of.group, blocks = (of.outputs + 63) / 64;
        const auto codes = take(of.outputs * of.columns), zeros = take(groups * of.outputs);
        const auto scales = take(groups * of.outputs * width(of.scale_kind));
        const auto x = take(of.rows * of.columns * width(of.x_kind));
        std::vector<uint8_t> packed(blocks * of.planes * 32 * of.columns), back(codes.size());
        std::vector<uint8_t> out(of.rows * of.outputs * width(of.x_kind));
        openawq_pack(codes.data(), of.outputs, of.columns, int(of.planes), packed.data(), 1);
        openawq_unpack(packed.data(), of.outputs, of.columns, int(of.planes), back.data(), 1);
        if (openawq_w4(
                x.data(), of.columns, int(of.x_kind), of.rows, of.columns, of.outputs, packed.data(),
                scales.data(), int(of.scale_kind), zeros.data(), of.group, int(of.planes), out.data(),
                int(of.digits), 1))
            return 2;
        give(out);
        give(back);
    }
    return 0;
}
