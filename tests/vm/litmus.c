/* Store buffering, the litmus test behind every sleep-and-wake protocol: two CPUs each store to a word of their own, fence,
 * and load the other's word. With working fences at least one of them sees the other's store, in every round.
 * No libc: it is compiled on the host and loaded in a guest. Words are 128 bytes apart; see litmus.py. */
#include <stdatomic.h>
#include <stdint.h>

enum { TURN = 0, WORD = 256, SAW = 512, STRIDE = 128, STEPS = 3 };

static _Atomic uint64_t *at(char *base, int field, int role)
{
    return (_Atomic uint64_t *)(void *)(base + field + STRIDE * role);
}

static void meet(char *base, int role, uint64_t turn)
{
    atomic_store(at(base, TURN, role), turn);
    while (atomic_load(at(base, TURN, 1 - role)) < turn)
        ;
}

/* How many of the rounds ended with neither seeing the other. */
long store_buffering(char *base, int role, long rounds, int fenced)
{
    long violations = 0;
    for (uint64_t i = 1; i <= (uint64_t)rounds; i++) {
        meet(base, role, STEPS * i);
        atomic_store_explicit(at(base, WORD, role), i, memory_order_relaxed);
        if (fenced)
            atomic_thread_fence(memory_order_seq_cst);
        uint64_t saw = atomic_load_explicit(at(base, WORD, 1 - role), memory_order_relaxed) == i;
        atomic_store(at(base, SAW, role), saw);
        meet(base, role, STEPS * i + 1);
        violations += saw == 0 && atomic_load(at(base, SAW, 1 - role)) == 0;
        meet(base, role, STEPS * i + 2);
    }
    return violations;
}
