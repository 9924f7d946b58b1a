/* Named points of the protocol at which this process gets a signal, for tests: docs/faults.md says what each point is.
 * One point for the whole process, set before its rings are used. May depend on inner.h and signals. */
#include "inner.h"

#include <signal.h>

int idc_fault_armed = 0;
static int chosen, number;
static _Atomic uint64_t left;

int idc_fault_set(int point, uint64_t nth, int signal_number)
{
    if (point < 0 || nth == 0 || signal_number <= 0 || signal_number >= NSIG)
        return IDC_EINVAL;
    chosen = point;
    number = signal_number;
    atomic_store(&left, nth);
    idc_fault_armed = point;
    return IDC_OK;
}

void idc_fault_pass(int point)
{
    /* raise() returns after the signal has come: nothing of the protocol happens between the point and the stop. */
    if (point == chosen && atomic_fetch_sub(&left, 1) == 1)
        raise(number);
}
