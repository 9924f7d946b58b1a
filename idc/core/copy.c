/* Copy routines and the choice between them, by a measurement at start-up and not by a constant: libc's large copy
 * is the fastest natively and several times slower than `rep movsq` under TCG. May depend on libc only. */
#include "inner.h"

#include <pthread.h>
#include <stdlib.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

typedef void copy_fn(void *dst, const void *src, uint64_t n);

static void copy_libc(void *dst, const void *src, uint64_t n)
{
    memcpy(dst, src, n);
}

static void copy_words(void *dst, const void *src, uint64_t n)
{
    uint8_t *d = dst;
    const uint8_t *s = src;
    for (; n > 64; n -= 32, d += 32, s += 32) {
        uint64_t w[4];
        memcpy(w, s, sizeof w); /* constant sizes: plain moves */
        memcpy(d, w, sizeof w);
    }
    copy_small(d, s, n);
}

#if defined(__x86_64__)
static void copy_movsb(void *dst, const void *src, uint64_t n)
{
    __asm__ volatile("rep movsb" : "+D"(dst), "+S"(src), "+c"(n)::"memory");
}

static void copy_movsq(void *dst, const void *src, uint64_t n)
{
    uint64_t words = n / 8, rest = n % 8;
    __asm__ volatile("rep movsq\n\tmovq %3, %%rcx\n\trep movsb"
                     : "+D"(dst), "+S"(src), "+c"(words)
                     : "r"(rest)
                     : "memory");
}

static void copy_sse2(void *dst, const void *src, uint64_t n)
{
    uint8_t *d = dst;
    const uint8_t *s = src;
    for (; n > 64; n -= 64, d += 64, s += 64)
#pragma GCC unroll 4
        for (int i = 0; i < 64; i += 16)
            _mm_storeu_si128((__m128i *)(void *)(d + i), _mm_loadu_si128((const __m128i *)(const void *)(s + i)));
    copy_small(d, s, n);
}

__attribute__((target("avx2"))) static void copy_avx2(void *dst, const void *src, uint64_t n)
{
    uint8_t *d = dst;
    const uint8_t *s = src;
    for (; n > 128; n -= 128, d += 128, s += 128)
#pragma GCC unroll 4
        for (int i = 0; i < 128; i += 32)
            _mm256_storeu_si256((__m256i *)(void *)(d + i), _mm256_loadu_si256((const __m256i *)(const void *)(s + i)));
    copy_sse2(d, s, n);
}
#endif

static const struct {
    const char *name;
    copy_fn *run;
} routines[] = {
    {"libc", copy_libc},
    {"words", copy_words},
#if defined(__x86_64__)
    {"movsb", copy_movsb},
    {"movsq", copy_movsq},
    {"sse2", copy_sse2},
    {"avx2", copy_avx2}, /* last: left out by idc_copy_count() where the CPU has none */
#endif
};

enum { CLASSES = 3, AREA = 1 << 20 };
static const uint64_t class_limit[CLASSES] = {1024, 16384, UINT64_MAX};
static const uint64_t class_probe[CLASSES] = {512, 4096, 65536};
static const uint32_t class_rounds[CLASSES] = {256, 64, 8}; /* about 0.1 ms each at 2 GB/s */
static _Atomic int chosen[CLASSES];

int idc_copy_count(void)
{
    int all = (int)(sizeof routines / sizeof routines[0]);
#if defined(__x86_64__)
    if (!__builtin_cpu_supports("avx2"))
        return all - 1;
#endif
    return all;
}

const char *idc_copy_name(int routine)
{
    return routine >= 0 && routine < idc_copy_count() ? routines[routine].name : NULL;
}

void idc_copy_run(int routine, void *dst, const void *src, uint64_t n)
{
    if (routine >= 0 && routine < idc_copy_count())
        routines[routine].run(dst, src, n);
}

int64_t idc_loop_copy(int routine, void *dst, const void *src, uint64_t span, uint64_t chunk, uint64_t rounds)
{
    if (chunk == 0 || chunk > span || idc_copy_name(routine) == NULL)
        return IDC_EINVAL;
    uint64_t at = 0, start = idc_now_ns();
    for (uint64_t i = 0; i < rounds; i++) {
        idc_copy_run(routine, (uint8_t *)dst + at, (const uint8_t *)src + at, chunk);
        at = at + 2 * chunk <= span ? at + chunk : 0;
    }
    return (int64_t)(idc_now_ns() - start);
}

/* The routine with the best of five rounds; on a noisy machine only the best round says anything. Walks through a
 * megabyte, because a ring is not in the nearest cache either. */
static int measure(int size_class, uint8_t *dst, const uint8_t *src)
{
    int best = 0;
    uint64_t best_ns = UINT64_MAX;
    for (int round = 0; round < 5; round++)
        for (int i = 0; i < idc_copy_count(); i++) {
            int64_t ns = idc_loop_copy(i, dst, src, AREA, class_probe[size_class], class_rounds[size_class]);
            if ((uint64_t)ns < best_ns) {
                best_ns = (uint64_t)ns;
                best = i;
            }
        }
    return best;
}

static void choose(int only)
{
    uint8_t *area = malloc(2 * (size_t)AREA);
    if (area == NULL)
        return; /* libc, entry 0, is right everywhere and only slower */
    memset(area, 1, 2 * (size_t)AREA); /* real pages, or the zero page would be measured */
    for (int c = 0; c < CLASSES; c++)
        if (only < 0 || only == c)
            chosen[c] = measure(c, area, area + AREA);
    free(area);
}

static void choose_all(void) { choose(-1); }

void idc_copy_setup(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, choose_all);
}

int idc_copy_chosen(int size_class)
{
    idc_copy_setup();
    return size_class >= 0 && size_class < CLASSES ? chosen[size_class] : IDC_EINVAL;
}

int idc_copy_force(int size_class, int routine)
{
    if (size_class < 0 || size_class >= CLASSES || routine < -1 || routine >= idc_copy_count())
        return IDC_EINVAL;
    idc_copy_setup();
    if (routine < 0)
        choose(size_class);
    else
        chosen[size_class] = routine;
    return IDC_OK;
}

void idc_copy(void *dst, const void *src, uint64_t n)
{
    int size_class = n <= class_limit[0] ? 0 : n <= class_limit[1] ? 1 : 2;
    routines[atomic_load_explicit(&chosen[size_class], memory_order_relaxed)].run(dst, src, n);
}

int idc_copy_apart(void *dst, const void *src, uint64_t n)
{
    uintptr_t d = (uintptr_t)dst, s = (uintptr_t)src;
    if ((d > s ? d - s : s - d) < n)
        return IDC_EINVAL;
    idc_copy(dst, src, n);
    return IDC_OK;
}
