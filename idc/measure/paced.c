/* Loops that measure what a ping-pong cannot: how many messages go one way, and how long each round trip takes when
 * they are sent by a timetable and not whenever the last one came back. May depend on inner.h and the rest of the
 * core. */
#include "inner.h"
#include "measure.h"

#include <stdlib.h>
#include <time.h>

/* What a wait may take: until the deadline, and no longer than `most`. 0: the deadline has passed. */
static int64_t left_until(uint64_t deadline, uint64_t now, uint64_t most)
{
    if (now >= deadline)
        return 0;
    return (int64_t)(deadline - now < most ? deadline - now : most);
}

/* The same call again as long as it only made way for the interpreter (IDC_INTR while it polls). */
static bool again(int64_t rc, int64_t spin_ns)
{
    return rc == IDC_AGAIN || (rc == IDC_INTR && spin_ns != 0);
}

/* A sleeper wakes up late; the rest is polled. */
enum { SLEEP_LEAST_NS = 400000, SLEEP_SHORT_NS = 200000 };

void idc_sleep_until(uint64_t due)
{
    uint64_t now = idc_now_ns();
    if (due > now + SLEEP_LEAST_NS) {
        uint64_t ns = due - now - SLEEP_SHORT_NS;
        struct timespec time = {.tv_sec = (time_t)(ns / 1000000000), .tv_nsec = (long)(ns % 1000000000)};
        nanosleep(&time, NULL);
    }
    while (idc_now_ns() < due)
        ;
}

int64_t idc_loop_clock(uint64_t n)
{
    uint64_t start = idc_now_ns(), last = start;
    for (uint64_t i = 0; i < n; i++)
        last = idc_now_ns();
    return (int64_t)(last - start);
}

int64_t idc_loop_send(struct idc_ring *tx, uint64_t len, uint64_t n, int64_t spin_ns, uint64_t deadline)
{
    uint8_t *buf = calloc(1, len + 1);
    if (buf == NULL)
        return IDC_EINVAL;
    int64_t rc = IDC_OK;
    uint64_t done = 0;
    while (done < n) {
        rc = idc_msg_send(tx, buf, len, spin_ns, 0);
        while (again(rc, spin_ns)) {
            int64_t left = left_until(deadline, idc_now_ns(), INT64_MAX);
            rc = left == 0 ? IDC_TIMEOUT : idc_msg_send(tx, buf, len, spin_ns, left);
        }
        if (rc < 0)
            break;
        done++;
    }
    free(buf);
    return rc < 0 ? rc : (int64_t)done;
}

int64_t idc_loop_receive(struct idc_ring *rx, uint64_t n, int64_t spin_ns, uint64_t deadline)
{
    uint8_t *buf = malloc(rx->slot_size);
    if (buf == NULL)
        return IDC_EINVAL;
    int64_t rc = IDC_OK;
    uint64_t done = 0;
    while (done < n) {
        rc = idc_msg_recv(rx, buf, rx->slot_size, spin_ns, 0);
        while (again(rc, spin_ns)) {
            int64_t left = left_until(deadline, idc_now_ns(), INT64_MAX);
            rc = left == 0 ? IDC_TIMEOUT : idc_msg_recv(rx, buf, rx->slot_size, spin_ns, left);
        }
        if (rc < 0)
            break;
        done++;
    }
    free(buf);
    return rc < 0 ? rc : (int64_t)done;
}

/* Message i is due at start + i * interval, and its sample is the time from then, whenever it could really be sent, to
 * its echo. So a stall counts for each message that was due in it, and not once (coordinated omission). */
int64_t idc_loop_paced(struct idc_ring *tx, struct idc_ring *rx, uint64_t len, uint64_t *samples, uint64_t n,
                       uint64_t interval_ns, int64_t spin_ns, uint64_t deadline)
{
    uint8_t *buf = calloc(1, (rx->slot_size > len ? rx->slot_size : len) + 1);
    if (buf == NULL)
        return IDC_EINVAL;
    int64_t rc = IDC_OK;
    uint64_t sent = 0, back = 0, start = idc_now_ns();
    while (back < n) {
        uint64_t now = idc_now_ns(), due = start + sent * interval_ns;
        if (now >= deadline) {
            rc = IDC_TIMEOUT;
            break;
        }
        bool full = false;
        if (sent < n && now >= due) {
            rc = idc_msg_send(tx, buf, len, 0, 0);
            if (rc < 0 && rc != IDC_AGAIN)
                break;
            full = rc == IDC_AGAIN;
            sent += !full;
            due += full ? 0 : interval_ns;
        }
        uint64_t until = full || sent == n ? UINT64_MAX : due > now ? due - now : 0;
        if (back == sent) { /* nothing under way: only the timetable is waited for, asleep unless the mode is polling */
            if (spin_ns >= 0 && until > SLEEP_LEAST_NS)
                idc_sleep_until(due);
            rc = IDC_AGAIN;
        } else if (spin_ns < 0 || until <= (uint64_t)spin_ns) { /* it is not worth to sleep until the next is due */
            rc = idc_msg_recv(rx, buf, rx->slot_size, 0, 0);
        } else {
            rc = idc_msg_recv(rx, buf, rx->slot_size, spin_ns, left_until(deadline, now, until));
        }
        if (rc >= 0) {
            samples[back] = idc_now_ns() - (start + back * interval_ns);
            back++;
        } else if (rc != IDC_AGAIN && rc != IDC_TIMEOUT && rc != IDC_INTR) {
            break;
        }
    }
    free(buf);
    return back == n ? (int64_t)back : rc;
}
