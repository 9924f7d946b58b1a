/* Who has the only processor. Where there is one for all, whatever the pump gives to the kernel wakes somebody who runs at once,
 * finds the first piece of what is about to come, and sleeps again: two changes of threads for each piece. And whoever gives
 * something to the pump piece by piece is interrupted by the pump for each. May depend on pump.h and sched(7). */
#include "pump.h"

#include <sched.h>
#include <stdbool.h>
#include <unistd.h>

static bool alone(struct idc_pump *p)
{
    if (p->processors == 0) { /* a thread to which somebody else has given a policy keeps it */
        p->processors = sched_getscheduler(0) == SCHED_OTHER ? (int32_t)sysconf(_SC_NPROCESSORS_ONLN) : -1;
        p->policy = SCHED_OTHER;
        p->gathers = 0;
    }
    return p->processors == 1;
}

static bool adopt(struct idc_pump *p, int policy)
{
    struct sched_param param = {.sched_priority = policy == SCHED_FIFO};
    if (p->policy != policy && sched_setscheduler(0, policy, &param) < 0) /* 0: this thread */
        return false;
    p->policy = policy;
    return true;
}

void idc_pump_gather(struct idc_pump *p, int gathers)
{
    if (!alone(p) || p->gathers == (uint32_t)(gathers != 0))
        return;
    p->gathers = gathers != 0;
    adopt(p, gathers ? SCHED_BATCH : SCHED_OTHER); /* that needs no privilege; where it is refused all the same, nothing is lost */
}

void idc_pump_hold(struct idc_pump *p)
{
    if (!alone(p))
        return;
    if (!p->refused && !adopt(p, SCHED_FIFO))
        p->refused = 1; /* no CAP_SYS_NICE: it goes on as everybody, interrupted more often */
    p->count_of.holds += !p->refused;
    p->count_of.unheld += p->refused;
}

void idc_pump_let_go(struct idc_pump *p)
{
    if (p->policy == SCHED_FIFO)
        adopt(p, p->gathers ? SCHED_BATCH : SCHED_OTHER);
}
