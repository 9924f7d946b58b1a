/* Two threads, each with one end of a socket that takes and gives bytes in odd pieces: what one posts, the other has to find,
 * whole and in order; then rubbish, of which nothing but an end may come. Prints what it moved. */
#include "wire.h"

#include <assert.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

enum { ROOM = 8192, MOST = 1 << 20, KINDS = 8 };
static const uint32_t lengths[KINDS] = {0, 8, 20, 3000, IDC_WIRE_LONG - 1, IDC_WIRE_LONG, 70000, 300000};
static uint32_t rounds;

static struct idc_wire *make(int fd)
{
    struct idc_wire *w = calloc(1, sizeof *w);
    *w = (struct idc_wire){.fd = fd, .in = malloc(ROOM), .room = ROOM, .longest = 1 << 24, .most = MOST};
    return w;
}

static void drop(struct idc_wire *w)
{
    idc_wire_free(w);
    free(w->in);
    free(w);
}

static uint32_t length_of(uint32_t i)
{
    return lengths[(i * 2654435761u >> 16) % KINDS];
}

static void *sends(void *wire)
{
    struct idc_wire *w = wire;
    static uint8_t bodies[256][300000];
    for (uint32_t i = 0; i < 256; i++)
        memset(bodies[i], (int)i, sizeof bodies[i]);
    for (uint32_t i = 0; i < rounds; i++) {
        uint32_t len = length_of(i), head = len < 8 ? len : 8;
        int rc;
        while ((rc = idc_wire_post(w, bodies[i % 256], head, bodies[i % 256], len - head)) == IDC_AGAIN)
            assert(idc_wire_flush(w, 1000000000) != IDC_PEER);
        assert(rc == IDC_OK);
        if (i % 3 == 0)
            assert(idc_wire_flush(w, 0) != IDC_PEER);
    }
    while (w->unsent > 0)
        assert(idc_wire_flush(w, 1000000000) != IDC_PEER);
    return NULL;
}

static void takes(struct idc_wire *w)
{
    uint32_t lens[5], i = 0;
    uint8_t *body = NULL;
    uint64_t bytes = 0;
    while (i < rounds) {
        int64_t got = idc_wire_take(w, lens, 5, i % 2 ? 5000000 : 1000000000);
        assert(got >= 0 || got == IDC_TIMEOUT || got == IDC_INTR);
        uint64_t at = w->first;
        for (int64_t k = 0; k < got; k++, i++) {
            uint32_t len = length_of(i);
            bytes += len;
            if (k == 0 && w->apart) {
                assert(len == w->body_len + 8 && w->head[7] == i % 256 && body[0] == i % 256 && body[len - 9] == i % 256);
                free(body);
                body = NULL;
                continue;
            }
            uint32_t is = lens[k - w->apart];
            assert(is == len && (len == 0 || (w->in[at] == i % 256 && w->in[at + len - 1] == i % 256)));
            at += len + 4;
        }
        if (w->want != 0) {
            assert(body == NULL);
            body = malloc(w->want);
            idc_wire_into(w, body);
        }
    }
    printf("%u frames, %llu bytes\n", i, (unsigned long long)bytes);
}

static void rubbish(uint32_t seed)
{
    int fds[2];
    uint8_t noise[5000];
    uint32_t lens[64];
    uint8_t *body = NULL;
    int64_t got;
    assert(socketpair(AF_UNIX, SOCK_STREAM, 0, fds) == 0);
    srand(seed);
    for (uint32_t i = 0; i < sizeof noise; i++)
        noise[i] = (uint8_t)(i % 4 >= 2 && seed % 2 ? 0 : rand()); /* small lengths, every other time */
    assert(send(fds[0], noise, sizeof noise, 0) == sizeof noise && shutdown(fds[0], SHUT_WR) == 0);
    struct idc_wire *w = make(fds[1]);
    while ((got = idc_wire_take(w, lens, 64, 1000000000)) >= 0)
        if (w->want != 0) {
            free(body);
            body = malloc(w->want);
            idc_wire_into(w, body);
        }
    assert(got == IDC_PEER || got == IDC_TOOBIG);
    free(body);
    drop(w);
}

int main(int argc, char **argv)
{
    rounds = argc > 1 ? (uint32_t)atoi(argv[1]) : 1000;
    int fds[2], small = 4096;
    assert(socketpair(AF_UNIX, SOCK_STREAM, 0, fds) == 0);
    setsockopt(fds[0], SOL_SOCKET, SO_SNDBUF, &small, sizeof small);
    struct idc_wire *one = make(fds[0]), *two = make(fds[1]);
    pthread_t sender;
    pthread_create(&sender, NULL, sends, one);
    takes(two);
    pthread_join(sender, NULL);
    drop(one);
    drop(two);
    for (uint32_t seed = 0; seed < 200; seed++)
        rubbish(seed);
    return 0;
}
