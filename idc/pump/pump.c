/* One loop over a ring and descriptors of the kernel's: work while there is any, poll while that pays, then arm the ring's
 * event word and sleep on all of them. May depend on inner.h, transact.h and poll(2). */
#include "inner.h"
#include "pump.h"

#include <poll.h>
#include <sched.h>
#include <time.h>
#include <unistd.h>

enum { POLLS_PER_TRY = 64 }; /* polls of the ring between two tries of descriptors */

int idc_pump_announce(struct idc_pump *p)
{
    struct idc_ring *tx = p->engine->tx;
    if (tx->pos - tx->notified <= (p->quiet_at == tx->notified ? p->quiet : 0))
        return IDC_OK; /* nothing, or only what can wait */
    uint64_t rung = tx->count.doorbells;
    int rc = idc_notify(tx);
    p->count_of.doorbells += tx->count.doorbells - rung;
    return rc;
}

void idc_pump_hush(struct idc_pump *p)
{
    uint64_t notified = p->engine->tx->notified; /* Python may have announced something meanwhile */
    p->quiet = p->quiet_at == notified ? p->quiet + 1 : 1;
    p->quiet_at = notified;
}

/* Lets the shape have its completions; how many events are left, moved together. */
static int64_t sift(struct idc_pump *p, const uint8_t *buf, struct idc_event *events, int64_t n)
{
    int64_t left = 0;
    for (int64_t i = 0; i < n; i++)
        if (events[i].kind != IDC_COMPLETED || p->done == NULL || p->done(p, &events[i], buf + events[i].at) != 0)
            events[left++] = events[i];
    return left;
}

/* What is in the ring: events for Python (> 0), 0 when all is dealt with, IDC_AGAIN when there was nothing, or the end. */
static int64_t from_ring(struct idc_pump *p, void *buf, uint64_t cap, struct idc_event *events, uint32_t n)
{
    uint64_t before = p->engine->rx->pos;
    int64_t got = idc_engine_take(p->engine, buf, cap, events, n);
    p->count_of.frames += p->engine->rx->pos - before;
    if (got > 0)
        got = sift(p, buf, events, got);
    else if (got == IDC_AGAIN && p->engine->rx->pos != before)
        got = 0;
    return got;
}

/* What the descriptors have: how much was moved, or -1. `polled`: their revents, or NULL to try each. */
static int64_t from_fds(struct idc_pump *p, const struct pollfd *polled)
{
    int64_t moved = 0;
    p->more = 0;
    for (uint32_t i = 0; i < p->count; i++) {
        if (p->fds[i].fd < 0 || p->fds[i].want == 0 || (polled != NULL && polled[i].revents == 0))
            continue;
        int64_t n = p->ready(p, i, polled != NULL ? (uint32_t)(uint16_t)polled[i].revents : 0);
        if (n < 0)
            return -1;
        moved += n;
    }
    p->count_of.moved += (uint64_t)moved;
    return moved;
}

/* What waiting may end with, besides the core's results: 0 and these. */
enum { IN_RING = 1, FDS_MOVED = 2, STOPPED = 3, WANTED = 4, FAILED = -100 };
enum { YIELDED_NS = 20000 }; /* a yield this long: somebody else had the processor */

static int try_fds(struct idc_pump *p)
{
    int64_t moved = from_fds(p, NULL);
    return moved < 0 ? FAILED : moved > 0 ? FDS_MOVED : 0;
}

/* One poll of the ring, and each POLLS_PER_TRY of all else, too. */
static inline int glance(struct idc_pump *p, uint32_t polls)
{
    struct idc_ring *rx = p->engine->rx;
    int rc = ready(rx, 1);
    if (rc == 0 && polls > EAGER_POLLS)
        cpu_relax();
    if (rc == 0 && polls % POLLS_PER_TRY == 0)
        rc = ready_or_ended(rx, 1);
    return rc == 0 && polls % POLLS_PER_TRY == 0 ? try_fds(p) : rc;
}

static int spin(struct idc_pump *p, uint64_t budget_ns)
{
    uint64_t start = idc_now_ns();
    for (uint32_t polls = 1;; polls++) {
        int rc = glance(p, polls);
        if (rc != 0)
            return rc;
        if (polls % POLLS_PER_TRY != 0)
            continue;
        uint64_t now = idc_now_ns();
        if (now - start >= budget_ns)
            return 0;
        sched_yield(); /* whoever is to fill the descriptors may want this CPU: then it is not free to poll with */
        if (idc_now_ns() - now >= YIELDED_NS)
            return (rc = try_fds(p)) == 0 ? WANTED : rc;
    }
}

/* Polling for as long as the device's user said. */
enum {
    LOOK_NS = 1000000,      /* between two looks at all descriptors by poll(2) */
    AWAY_NS = 2000000,      /* that another thread had the CPU since the last such look: it will go on wanting it */
    CALM_NS = 4000000,      /* polled for so long in all since somebody did */
    SHY_FIRST_NS = 2000000, /* then it sleeps, for a doorbell to wake it at once, before it polls on: so long, and twice */
    SHY_MOST_NS = 250000000, /* as long each time until nobody wants the CPU any more */
};

/* What this thread has run, and what its whole machine was kept from running: that is no wish of anybody's in there. */
static uint64_t own_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* All descriptors by the kernel, also those that only poll(2) tells of. */
static int look(struct idc_pump *p)
{
    struct pollfd fds[IDC_PUMP_FDS + 1];
    for (uint32_t i = 0; i < p->count; i++)
        fds[i] = (struct pollfd){.fd = p->fds[i].want != 0 ? p->fds[i].fd : -1, .events = (short)p->fds[i].want};
    fds[p->count] = (struct pollfd){.fd = p->stop_fd, .events = POLLIN};
    if (poll(fds, p->count + 1, 0) <= 0)
        return 0;
    if (fds[p->count].revents != 0)
        return STOPPED;
    int64_t moved = from_fds(p, fds);
    return moved < 0 ? FAILED : moved > 0 ? FDS_MOVED : 0;
}

/* What a look says of others: whether they had the CPU for so long since the last one that they will go on wanting it. The time
 * that they did not need adds up, over as many waits as it takes: a busy queue waits for moments only. */
static bool wanted(struct idc_pump *p, uint64_t elapsed, uint64_t own)
{
    bool others = elapsed >= own + AWAY_NS;
    p->calm_ns = others ? 0 : p->calm_ns + own;
    if (p->calm_ns >= CALM_NS)
        p->shy_ns = 0;
    return others;
}

/* Polls until then. Whoever else can run does so at each yield; WANTED: somebody did that, and has not done with it. */
static int watch(struct idc_pump *p, uint64_t start, uint64_t until)
{
    uint64_t now = start, looked = start, ran = own_ns(), own;
    int rc = 0;
    for (uint32_t polls = 1; rc == 0; polls++) {
        rc = glance(p, polls);
        if (rc != 0)
            break;
        if (polls % POLLS_PER_TRY != 0)
            continue;
        now = idc_now_ns();
        if (now < until && now - looked < LOOK_NS) {
            sched_yield();
            continue;
        }
        own = own_ns();
        if (wanted(p, now - looked, own - ran))
            return WANTED;
        if (now >= until)
            return 0;
        looked = now;
        ran = own;
        rc = look(p);
        if (rc == 0)
            sched_yield();
    }
    if (p->shy_ns != 0) /* the rest of the time was calm, too, or it was not */
        wanted(p, idc_now_ns() - looked, own_ns() - ran);
    return rc;
}

/* Arms, looks once more, and sleeps. */
static int nap(struct idc_pump *p, uint64_t ns)
{
    struct idc_ring *rx = p->engine->rx;
    struct pollfd fds[IDC_PUMP_FDS + 2]; /* the doorbell, which may be masked, comes first; the shape's; to stop */
    uint32_t last = p->count + 1;
    bool others = false;
    store_release(rx->my_event, rx->pos + 1);
    /* As in wait.c: orders my event word before my last look. Pairs with the fence in idc_notify. */
    full_fence();
    int there = ready_or_ended(rx, 1);
    if (there != 0)
        return there;
    fds[0] = (struct pollfd){.fd = rx->wake_fd, .events = POLLIN};
    for (uint32_t i = 0; i < p->count; i++)
        fds[i + 1] = (struct pollfd){.fd = p->fds[i].want != 0 ? p->fds[i].fd : -1, .events = (short)p->fds[i].want};
    fds[last] = (struct pollfd){.fd = p->stop_fd, .events = POLLIN};
    p->count_of.sleeps++;
    int woken = mask_poll(&rx->mask_state, fds, last + 1, rx->pos + p->count_of.moved, ns < RECHECK_NS ? ns : RECHECK_NS);
    rx->count.masked = rx->mask_state.masked;
    if (woken < 0)
        return woken;
    p->count_of.wakeups += woken == 1;
    for (uint32_t i = 1; i <= last && woken != 2; i++)
        others |= fds[i].revents != 0;
    there = ready_or_ended(rx, 1);
    if (woken == 0 && !others && there != 0 && p->lull == 0 && ns >= RECHECK_NS) /* a shorter sleep ends before a doorbell comes */
        p->count_of.late += idc_bell_wait(rx->wake_fd, IN_FLIGHT_NS) == IDC_TIMEOUT;
    if (others && fds[last].revents != 0)
        return STOPPED;
    if (others && from_fds(p, fds + 1) < 0)
        return FAILED;
    return there != 0 ? there : others ? FDS_MOVED : 0;
}

/* A wait begins: polls, and sleeps in between as long as others want the CPU. 0: nothing came for poll_ns. */
static int attend(struct idc_pump *p, uint64_t ns)
{
    uint64_t now = idc_now_ns(), until = now + (p->poll_ns < ns ? p->poll_ns : ns);
    bool slept = false;
    int rc = 0;
    p->count_of.spins++;
    while (rc == 0 && now < until) {
        if (now < p->shy_until) {
            slept = true;
            rc = nap(p, (p->shy_until < until ? p->shy_until : until) - now);
        } else {
            slept = false;
            rc = watch(p, now, until);
        }
        now = idc_now_ns();
        if (rc == WANTED) {
            p->count_of.yielded++;
            p->shy_ns = p->shy_ns == 0 ? SHY_FIRST_NS : 2 * p->shy_ns < SHY_MOST_NS ? 2 * p->shy_ns : SHY_MOST_NS;
            p->shy_until = now + p->shy_ns;
            rc = 0;
        }
    }
    p->count_of.spins_won += rc > 0 && !slept;
    return rc;
}

/* Until there is something to do, or ns are over. */
static int rest(struct idc_pump *p, int64_t spin_ns, uint64_t ns)
{
    struct idc_ring *rx = p->engine->rx;
    uint64_t allowed = patience(rx, spin_ns);
    bool begins = p->since == 0;
    if (begins)
        p->since = idc_now_ns();
    int rc = begins && p->poll_ns > 0 ? attend(p, ns) : 0;
    bool polls = rc == 0 && begins && allowed > 0 && p->score >= SCORE_SPIN && p->poll_ns == 0;
    if (polls) {
        p->count_of.spins++;
        rc = spin(p, allowed < ns ? allowed : ns);
        p->count_of.spins_won += rc > 0 && rc != WANTED;
        if (rc >= 0 && rc != WANTED)
            p->score = learned(p->score, rc > 0);
        rc = rc == WANTED ? 0 : rc;
        p->since = rc == 0 ? UINT64_MAX : p->since; /* nothing more is to be learned from it */
    }
    if (rc == 0) {
        rc = nap(p, ns);
        if (rc > 0 && p->since != UINT64_MAX)
            p->score = learned(p->score, idc_now_ns() - p->since <= would_do(allowed));
    }
    if (rc > 0)
        p->since = 0;
    return rc;
}

/* One turn: events for Python, 0 when something was done, IDC_AGAIN when there was nothing to do, FAILED, or the end. */
static int64_t turn(struct idc_pump *p, void *buf, uint64_t cap, struct idc_event *events, uint32_t n)
{
    p->count_of.turns++;
    int64_t got = from_ring(p, buf, cap, events, n), moved = 0;
    if (got != 0 && got != IDC_AGAIN)
        return got;
    /* What came by the ring may have made the kernel say something at once; else it is asked by poll(2). */
    if (got == 0 || p->more != 0)
        moved = from_fds(p, NULL);
    if (moved < 0)
        return FAILED;
    int told = idc_pump_announce(p);
    if (told != IDC_OK)
        return told;
    return moved > 0 ? 0 : got;
}

int64_t idc_pump_run(struct idc_pump *p, void *buf, uint64_t cap, struct idc_event *events, uint32_t n, int64_t spin_ns,
                     int64_t timeout_ns)
{
    uint64_t deadline = timeout_ns < 0 ? UINT64_MAX : idc_now_ns() + (uint64_t)timeout_ns, now;
    int64_t rc = p->count > IDC_PUMP_FDS ? IDC_EINVAL : IDC_OK;
    p->error = 0;
    while (rc == IDC_OK && p->engine->budget > 0) {
        rc = turn(p, buf, cap, events, n);
        p->since = rc != IDC_AGAIN ? 0 : p->since; /* the wait is over, though nobody waited at that moment */
        if (rc == IDC_OK) {
            p->engine->budget -= p->engine->budget > 0; /* descriptors alone can keep it busy for ever, too */
        } else if (rc == IDC_AGAIN && timeout_ns != 0) {
            now = idc_now_ns();
            int why = now >= deadline ? IDC_TIMEOUT : rest(p, spin_ns, deadline - now);
            rc = why == IN_RING || why == FDS_MOVED ? IDC_OK : why;
        }
    }
    int told = idc_pump_announce(p);
    if (rc == FAILED && p->error < 0)
        return p->error;
    return rc == FAILED || rc == STOPPED ? 0 : rc != IDC_OK ? rc : told;
}
