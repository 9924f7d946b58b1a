/* The loops of a connected stream socket (TCP, vsock, Unix): the peers of the rings, written as tightly as those.
 * `polls` not 0 never sleeps: the strongest a socket can do for latency. The socket has its own time-out (SO_RCVTIMEO,
 * SO_SNDTIMEO), which also bounds polling through the deadline. Depends on libc only. */
#include "measure.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/socket.h>

enum { POLLS_PER_CLOCK = 256 };

/* IDC_OK to try again, else the result that a failed call means. */
static int failed(int polls, uint32_t *tries, uint64_t deadline)
{
    if (errno == EINTR)
        return IDC_INTR;
    if (errno != EAGAIN && errno != EWOULDBLOCK)
        return errno == EPIPE || errno == ECONNRESET ? IDC_PEER : IDC_EINVAL;
    if (!polls)
        return IDC_TIMEOUT;
    return ++*tries % POLLS_PER_CLOCK == 0 && idc_now_ns() >= deadline ? IDC_TIMEOUT : IDC_OK;
}

static int put(int fd, const uint8_t *buf, uint64_t len, int polls, uint64_t deadline)
{
    uint32_t tries = 0;
    for (uint64_t done = 0; done < len;) {
        ssize_t n = send(fd, buf + done, len - done, MSG_NOSIGNAL | (polls ? MSG_DONTWAIT : 0));
        if (n >= 0) {
            done += (uint64_t)n;
            continue;
        }
        int rc = failed(polls, &tries, deadline);
        if (rc != IDC_OK)
            return rc;
    }
    return IDC_OK;
}

/* At least `min` bytes, `most` at most; how many, or a negative result. */
static int64_t take(int fd, uint8_t *buf, uint64_t min, uint64_t most, int polls, uint64_t deadline)
{
    uint32_t tries = 0;
    uint64_t done = 0;
    while (done < min) {
        ssize_t n = recv(fd, buf + done, most - done, polls ? MSG_DONTWAIT : 0);
        if (n == 0)
            return IDC_PEER;
        if (n > 0) {
            done += (uint64_t)n;
            continue;
        }
        int rc = failed(polls, &tries, deadline);
        if (rc != IDC_OK)
            return rc;
    }
    return (int64_t)done;
}

int64_t idc_loop_fd_ping(int fd, uint64_t len, uint64_t *samples, uint64_t n, uint64_t per, int polls,
                         uint64_t deadline)
{
    uint8_t *buf = per == 0 || len == 0 ? NULL : calloc(1, len);
    if (buf == NULL)
        return IDC_EINVAL;
    int64_t rc = IDC_OK;
    uint64_t done = 0, before = idc_now_ns();
    for (; rc >= 0 && done < n; done++) {
        for (uint64_t i = 0; rc >= 0 && i < per; i++) {
            rc = put(fd, buf, len, polls, deadline);
            if (rc >= 0)
                rc = take(fd, buf, len, len, polls, deadline);
        }
        if (rc < 0)
            break;
        uint64_t now = idc_now_ns();
        samples[done] = (now - before) / per;
        before = now;
    }
    free(buf);
    return rc < 0 ? rc : (int64_t)done;
}

int64_t idc_loop_fd_paced(int fd, uint64_t len, uint64_t *samples, uint64_t n, uint64_t interval_ns, uint64_t deadline)
{
    uint8_t *buf = len == 0 ? NULL : calloc(1, len);
    if (buf == NULL)
        return IDC_EINVAL;
    int64_t rc = IDC_OK;
    uint64_t done = 0, start = idc_now_ns();
    for (; rc >= 0 && done < n; done++) {
        uint64_t due = start + done * interval_ns;
        idc_sleep_until(due);
        rc = put(fd, buf, len, 0, deadline);
        if (rc >= 0)
            rc = take(fd, buf, len, len, 0, deadline);
        if (rc < 0)
            break;
        samples[done] = idc_now_ns() - due;
    }
    free(buf);
    return rc < 0 ? rc : (int64_t)done;
}

int64_t idc_loop_fd_echo(int fd, uint64_t len, uint64_t rounds, int polls, uint64_t deadline)
{
    uint8_t *buf = len == 0 ? NULL : calloc(1, len);
    if (buf == NULL)
        return IDC_EINVAL;
    int64_t rc = IDC_OK;
    uint64_t done = 0;
    for (; done < rounds; done++) {
        rc = take(fd, buf, len, len, polls, deadline);
        if (rc >= 0)
            rc = put(fd, buf, len, polls, deadline);
        if (rc < 0)
            break;
    }
    free(buf);
    return rc < 0 ? rc : (int64_t)done;
}

int64_t idc_loop_fd_out(int fd, uint64_t total, uint64_t chunk, uint64_t deadline)
{
    uint8_t *buf = chunk == 0 ? NULL : calloc(1, chunk);
    if (buf == NULL)
        return IDC_EINVAL;
    int64_t rc = IDC_OK;
    uint64_t done = 0;
    for (; rc == IDC_OK && done < total; done += chunk)
        rc = put(fd, buf, total - done < chunk ? total - done : chunk, 0, deadline);
    free(buf);
    return rc < 0 ? rc : (int64_t)total;
}

int64_t idc_loop_fd_in(int fd, uint64_t total, uint64_t chunk, uint64_t deadline)
{
    uint8_t *buf = chunk == 0 ? NULL : calloc(1, chunk);
    if (buf == NULL)
        return IDC_EINVAL;
    int64_t rc = IDC_OK;
    uint64_t done = 0;
    while (rc >= 0 && done < total) {
        rc = take(fd, buf, 1, total - done < chunk ? total - done : chunk, 0, deadline);
        done += rc > 0 ? (uint64_t)rc : 0;
    }
    free(buf);
    return rc < 0 ? rc : (int64_t)done;
}
