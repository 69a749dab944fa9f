/* What the C that ptx.py makes of a kernel is built on: registers of 32 lanes, checked memory, warps and programs. */
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint8_t b8, u8, pred;
typedef uint16_t b16, u16;
typedef uint32_t b32, u32;
typedef uint64_t b64, u64;
typedef int8_t s8;
typedef int16_t s16;
typedef int32_t s32;
typedef int64_t s64;
typedef _Float16 f16;
typedef float f32;
typedef float f32x2 __attribute__((vector_size(8)));
typedef double f64;

/* A register in one lane, read as what an instruction takes it for. */
typedef union {
    b8 b8, u8, pred; b16 b16, u16; b32 b32, u32; b64 b64, u64; s8 s8; s16 s16; s32 s32; s64 s64;
    f16 f16; f32 f32; f32x2 f32x2; f64 f64;
} Lane;

#define LANES for (int l = 0; l < 32; l++)

/* The state of a warp: the line where it goes on, 0 at the start and -1 at the end, its number, and its registers. */
typedef struct { int at, number; REGISTERS } Warp;

static void go_on(Warp *w, const u64 *parameters);

static u32 program, programs;
static Warp warps[WARPS];
static u8 shared_memory[SHARED + 1] __attribute__((aligned(16)));

const char *failure;
static jmp_buf end_of_launch;

static void fail(const char *what, int line) {
    failure = what;
    longjmp(end_of_launch, line);
}

static void *global_at(u64 address, unsigned size, int line) {
    if (address % size) fail("an address in global memory that is not aligned", line);
    return (void *)address;
}

static void *shared_at(u32 address, unsigned size, int line) {
    if (address % size) fail("an address in shared memory that is not aligned", line);
    if ((u64)address + size > SHARED) fail("outside of shared memory", line);
    return shared_memory + address;
}

/* The number of a condition's lanes, which is all or none. */
static int uniform(int lanes, int line) {
    if (lanes != 0 && lanes != 32) fail("a branch that the lanes of a warp do not take together", line);
    return lanes;
}

static u32 bits_of(u32 x, u32 first, u32 count, int is_signed) {
    first &= 255, count &= 255;
    if (!count) return 0;
    u32 last = first + count - 1, sign = is_signed && x >> (last < 31 ? last : 31) & 1 ? 0xffffffff : 0;
    u64 found = ((u64)sign << 32 | x) >> (first < 32 ? first : 32), mask = count < 32 ? (1u << count) - 1 : 0xffffffff;
    return (found & mask) | (sign & ~mask);
}

static u32 bytes_of(u32 a, u32 b, u32 selected) {
    u64 both = (u64)b << 32 | a;
    u32 result = 0;
    for (int i = 0; i < 4; i++) {
        u32 which = selected >> 4 * i & 15, byte = both >> 8 * (which & 7) & 255;
        result |= (which & 8 ? (byte & 128 ? 255u : 0) : byte) << 8 * i;
    }
    return result;
}

/* Which lane one reads from in a shuffle: its own, unless the other is in its segment. */
static int source(int lane, u32 clamp, int is_index, u32 by) {
    u32 segment = clamp >> 8 & 31, last = (lane & segment) | (clamp & 31 & ~segment);
    u32 other = is_index ? (lane & segment) | (by & 31 & ~segment) : lane ^ (by & 31);
    return other <= last ? (int)other : lane;
}

static u64 state;

static u32 below(u32 n) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (state >> 33) % n;
}

static void shuffle(u32 *numbers, u32 n) {
    for (u32 i = 0; i < n; i++) numbers[i] = i;
    for (u32 i = n; i > 1; i--) {
        u32 j = below(i), other = numbers[i - 1];
        numbers[i - 1] = numbers[j];
        numbers[j] = other;
    }
}

/* One program, in whose memory and registers is what another one may have left. */
static void run(const u64 *parameters) {
    memset(shared_memory, 0xAB, sizeof shared_memory);
    memset(warps, 0x5A, sizeof warps);
    for (int k = 0; k < WARPS; k++) warps[k].at = 0, warps[k].number = k;
    do {
        u32 order[WARPS];
        shuffle(order, WARPS);
        for (int k = 0; k < WARPS; k++) go_on(&warps[order[k]], parameters);
        for (int k = 1; k < WARPS; k++) {
            int one = warps[0].at, other = warps[k].at;
            if (one != other) fail("warps that wait at different barriers", one > other ? one : other);
        }
    } while (warps[0].at >= 0);
}

/* Run all programs; returns 0, or the line of the PTX at which there was a failure. */
int launch(const u64 *parameters, u32 grid, u64 seed) {
    u32 *order = malloc(grid * sizeof *order);
    int line = setjmp(end_of_launch);
    if (!line) {
        state = seed;
        programs = grid;
        shuffle(order, grid);
        for (u32 i = 0; i < grid; i++) {
            program = order[i];
            run(parameters);
        }
    }
    free(order);
    return line;
}
