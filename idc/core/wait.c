/* Waiting for the peer and waking it: spin while that pays, then arm the event word, look again, and block.
 * Whether spinning pays each wait says when it is over, also one that slept (learned, would_do), as in the kernel's halt
 * polling: so two sides that sleep though both had better poll find out, which neither can by polling alone.
 * May depend on inner.h, poll(2) and eventfds. */
#include "inner.h"

#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <time.h>
#include <unistd.h>

enum {
    YIELD_AFTER_NS = 20000,      /* a spin this long means the peer may want this very CPU, if it can run here */
    POLL_ONLY_NS = 50000000,     /* polling for ever returns IDC_INTR this often, so that signals are handled */
    DEBT_MOST = 64,              /* wake-ups to nothing before a descriptor is masked; see idc_mask_sleep */
    DEBT_AFTER = 56,             /* debt after that: where the storm goes on, eight more mask it again */
    FORGIVE_NS = 10000000,       /* one is forgiven in this time, so 100 a second are borne */
    LOOK_FIRST_NS = 4000000,     /* between two looks while masked: what traffic there is waits no longer than this */
    LOOK_MOST_NS = 16000000,     /* the same, when there is nothing but rings */
    CALM = 4,                    /* rings between two looks that are no storm */
    STORM = 1024,                /* wake-ups to nothing in one wait, then IDC_INTR: none of these polls sees a signal */
    FAR_YIELD_NS = 500000,       /* the same for a peer on another machine, which needs none of this one's CPUs */
};

int idc_pause_is_cheap = 1, idc_mfence_is_cheap, idc_cpus = 1;
_Atomic uint64_t idc_wake_ns;

uint64_t idc_now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* The least that STEPS pauses, or fences, take of four tries, ns. */
enum { STEPS = 64, CHEAP_NS = 80 };
static uint64_t least_ns(void (*step)(void))
{
    uint64_t least = UINT64_MAX;
    for (int try = 0; try < 4; try++) {
        uint64_t start = idc_now_ns();
        for (int i = 0; i < STEPS; i++)
            step();
        uint64_t ns = idc_now_ns() - start;
        least = ns < least ? ns : least;
    }
    return least;
}

void idc_wait_setup(void)
{
    idc_cpus = (int)sysconf(_SC_NPROCESSORS_ONLN);
    idc_pause_is_cheap = least_ns(cpu_relax) < STEPS * CHEAP_NS;
    uint64_t locked = least_ns(full_fence);
    idc_mfence_is_cheap = 1;
    idc_mfence_is_cheap = least_ns(full_fence) < locked;
}

int idc_bell_ring(const struct idc_bell *bell)
{
    if (bell->reg != NULL) {
        *bell->reg = bell->value; /* the fence in idc_notify ordered the data before this store */
        return IDC_OK;
    }
    static const uint64_t one = 1;
    while (bell->eventfd >= 0 && write(bell->eventfd, &one, sizeof one) < 0) {
        if (errno == EAGAIN)
            return IDC_OK; /* the counter is at its limit: it is readable, which is all a doorbell says */
        if (errno != EINTR)
            return IDC_EINVAL;
    }
    return IDC_OK;
}

/* On fds[0], a doorbell's descriptor, and whatever else there is. 1: fds[0] was readable and is emptied; 0: timeout, or others
 * have something (their revents); or IDC_INTR, IDC_EINVAL. */
static int sleep_on(struct pollfd *fds, uint32_t n, uint64_t ns)
{
    struct timespec t = {.tv_sec = (time_t)(ns / 1000000000u), .tv_nsec = (long)(ns % 1000000000u)};
    int ready = ppoll(fds, n, &t, NULL);
    if (ready < 0)
        return errno == EINTR ? IDC_INTR : IDC_EINVAL;
    uint64_t rung;
    if (ready == 0 || fds[0].revents == 0)
        return 0;
    if ((fds[0].revents & POLLIN) == 0 || (read(fds[0].fd, &rung, sizeof rung) < 0 && errno != EAGAIN && errno != EINTR))
        return IDC_EINVAL;
    return 1;
}

static int mask_look(struct idc_mask *m, struct pollfd *fds, uint32_t n, bool moved, uint64_t ns)
{
    uint64_t now = idc_now_ns(), due = m->at + m->period_ns, rung = 0;
    uint64_t nap = now >= due ? 0 : due - now < ns ? due - now : ns;
    struct timespec t = {.tv_sec = 0, .tv_nsec = (long)nap};
    fds[0].revents = 0;
    int ready = nap > 0 || n > 1 ? ppoll(fds + 1, n - 1, &t, NULL) : 0;
    if (ready < 0)
        return errno == EINTR ? IDC_INTR : IDC_EINVAL;
    if (ready > 0 && now < due)
        return 0;
    if (now + nap < due)
        return 2;
    if (read(fds[0].fd, &rung, sizeof rung) < 0 && errno != EAGAIN && errno != EINTR)
        return IDC_EINVAL;
    m->at = now + nap;
    m->looks++;
    if (rung <= CALM) {
        m->period_ns = 0;
        m->debt = DEBT_AFTER;
    } else {
        uint64_t longer = 2 * m->period_ns < LOOK_MOST_NS ? 2 * m->period_ns : LOOK_MOST_NS;
        m->period_ns = moved ? LOOK_FIRST_NS : longer;
    }
    return 2;
}

/* A peer may ring at any rate, and nobody stands between. What that costs is decided here: each wake-up to nothing is a
 * debt, each progress since the last sleep pays for one (a doorbell may be behind what it is for), time forgives
 * slowly. Too much of it, and the descriptor is masked: a timer looks in its place until the rings have ceased. */
int mask_poll(struct idc_mask *m, struct pollfd *fds, uint32_t n, uint64_t progress, uint64_t ns)
{
    bool moved = progress != m->progress, woken = m->woken != 0;
    m->progress = progress;
    m->woken = 0;
    if (m->period_ns != 0)
        return mask_look(m, fds, n, moved, ns);
    if ((woken && !moved) || m->debt > 0) {
        uint64_t now = idc_now_ns(), forgiven = (now - m->at) / FORGIVE_NS + moved;
        m->debt -= forgiven < m->debt ? (uint32_t)forgiven : m->debt;
        m->at = now - (now - m->at) % FORGIVE_NS;
        m->debt += woken && !moved;
        if (m->debt > DEBT_MOST) {
            m->masked++;
            m->period_ns = LOOK_FIRST_NS;
            m->at = now;
            return mask_look(m, fds, n, moved, ns);
        }
    }
    int rc = sleep_on(fds, n, ns);
    m->woken = rc == 1;
    return rc;
}

int idc_mask_sleep(struct idc_mask *m, int fd, uint64_t progress, uint64_t ns)
{
    struct pollfd p = {.fd = fd, .events = POLLIN, .revents = 0};
    return mask_poll(m, &p, 1, progress, ns);
}

int idc_bell_wait(int fd, int64_t timeout_ns)
{
    struct pollfd p = {.fd = fd, .events = POLLIN, .revents = 0};
    int rc = sleep_on(&p, 1, timeout_ns < 0 ? INT64_MAX : (uint64_t)timeout_ns);
    if (rc == 0)
        return IDC_TIMEOUT;
    return rc == 1 ? IDC_OK : rc;
}

int idc_wake_learn(const struct idc_bell *mine, int fd)
{
    enum { TRIES = 3, LOST_NS = 20000000 };
    int rc = IDC_OK;
    for (int try = 0; rc == IDC_OK && try < TRIES; try++) {
        uint64_t start = idc_now_ns(), least = atomic_load_explicit(&idc_wake_ns, memory_order_relaxed);
        rc = idc_bell_ring(mine);
        if (rc == IDC_OK)
            rc = idc_bell_wait(fd, LOST_NS);
        uint64_t ns = idc_now_ns() - start;
        if (rc == IDC_OK && (least == 0 || ns < least))
            atomic_store_explicit(&idc_wake_ns, ns, memory_order_relaxed);
    }
    int last = idc_bell_ring(mine); /* a peer's ring may have been taken for one of these, and somebody sleeps on it */
    return rc == IDC_OK ? last : rc;
}

/* 1 or negative when done, 0 when the budget is spent; `spent` is how long that took. The clock is first read after
 * POLLS_PER_LOOK polls, so that a short wait never pays for it (under TCG it can cost more than the round trip). */
static int spin(struct idc_ring *r, uint64_t need, uint64_t budget_ns, uint64_t *spent)
{
    uint64_t start = 0, now;
    bool elsewhere = r->bell.reg != NULL;
    for (uint32_t polls = 1;; polls++) {
        int rc = ready(r, need);
        if (rc != 0)
            return rc;
        if (polls > EAGER_POLLS)
            cpu_relax();
        if (polls % POLLS_PER_LOOK != 0)
            continue;
        rc = ready_or_ended(r, need);
        if (rc != 0)
            return rc;
        now = idc_now_ns();
        if (start == 0)
            start = now;
        *spent = now - start;
        if (*spent >= budget_ns)
            return 0;
        if (elsewhere ? *spent >= FAR_YIELD_NS : *spent >= YIELD_AFTER_NS || idc_cpus == 1)
            sched_yield();
    }
}

static int sleep_until(struct idc_ring *r, uint64_t need, uint64_t deadline)
{
    uint64_t event = r->pos + need - (r->role == IDC_PRODUCER ? r->size : 0);
    for (uint32_t nothing = 0;;) {
        store_release(r->my_event, event);
        /* Orders my event word before my last look for progress. Pairs with the fence in idc_notify between the peer's
         * publishing and its look at this word: either I see its progress here, or it sees my event and rings. */
        full_fence();
        fault_point(r, IDC_AT_ARMED);
        int rc = ready_or_ended(r, need);
        if (rc != 0)
            return rc;
        uint64_t now = idc_now_ns();
        if (now >= deadline)
            return IDC_TIMEOUT;
        uint64_t left = deadline - now;
        r->count.sleeps++;
        idc_observe(r);
        fault_point(r, IDC_AT_ASLEEP);
        rc = idc_mask_sleep(&r->mask_state, r->wake_fd, r->pos, left < RECHECK_NS ? left : RECHECK_NS);
        r->count.masked = r->mask_state.masked;
        if (rc < 0)
            return rc;
        if (rc == 2) {
            rc = ready_or_ended(r, need);
        } else if (rc == 1) {
            r->count.wakeups++;
            fault_point(r, IDC_AT_WOKEN);
            rc = ready_or_ended(r, need);
            r->count.spurious += rc == 0;
            nothing += rc == 0;
        } else if ((rc = ready_or_ended(r, need)) != 0) {
            int bell = idc_bell_wait(r->wake_fd, IN_FLIGHT_NS);
            r->count.late += bell == IDC_TIMEOUT;
            r->count.wakeups += bell == IDC_OK;
        }
        if (rc != 0)
            return rc;
        if (nothing == STORM)
            return IDC_INTR;
    }
}

int idc_wait(struct idc_ring *r, uint64_t need, int64_t spin_ns, int64_t timeout_ns)
{
    if (r->ended != IDC_OK)
        return r->ended;
    if (need == 0 || need > r->size / 2 || (r->kind == IDC_MESSAGES && need != 1))
        return IDC_EINVAL;
    int rc = idc_notify(r); /* what was posted must be announced before I wait for its effect */
    if (rc != IDC_OK)
        return rc;
    bool poll_only = spin_ns < 0 || r->wake_fd < 0;
    uint64_t allowed = poll_only ? POLL_ONLY_NS : patience(r, spin_ns), spent = 0;
    uint64_t budget = timeout_ns >= 0 && allowed > (uint64_t)timeout_ns ? (uint64_t)timeout_ns : allowed;
    bool polls = poll_only || (budget > 0 && r->spin_score >= SCORE_SPIN);
    if (polls) {
        rc = spin(r, need, budget, &spent);
        if (rc == 0 && poll_only)
            return timeout_ns >= 0 && budget == (uint64_t)timeout_ns ? IDC_TIMEOUT : IDC_INTR;
        r->count.spins_won += rc == 1;
        if (rc >= 0)
            r->spin_score = learned(r->spin_score, rc == 1);
    }
    if (rc == 0) {
        uint64_t start = idc_now_ns();
        rc = sleep_until(r, need, timeout_ns < 0 ? UINT64_MAX : start + (uint64_t)timeout_ns - spent);
        if (rc == 1 && !polls)
            r->spin_score = learned(r->spin_score, idc_now_ns() - start <= would_do(allowed));
    }
    return rc == 1 ? IDC_OK : rc;
}

uint64_t idc_load64(const void *word) { return load_acquire(word); }
void idc_store64(void *word, uint64_t value) { store_release(word, value); }
uint32_t idc_load32(const void *word) { return atomic_load_explicit((const _Atomic uint32_t *)word, memory_order_acquire); }
void idc_store32(void *word, uint32_t value) { atomic_store_explicit((_Atomic uint32_t *)word, value, memory_order_release); }
void idc_fence(void) { full_fence(); }
