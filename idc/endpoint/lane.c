/* MESSAGE and DONE frames of docs/idc.md over a wire. As in transact.c, it decides nothing: what is beyond doubt it carries out,
 * and every other frame goes to idc/endpoint/session.py, which knows what is wrong with it. */
#include "lane.h"

#include <stdbool.h>
#include <string.h>

struct header {
    uint8_t kind, flags;
    uint16_t error;
    uint32_t tag;
};
_Static_assert(sizeof(struct header) == IDC_WIRE_HEAD, "the header of a frame is what comes apart");

enum { MESSAGE = 2, DONE = 3, BEGINS = IDC_WIRE_LENGTH + IDC_WIRE_HEAD };
enum { SENDING_NS = 50000000 }; /* a wait for room in the kernel, before the interpreter has a look at its signals */

int idc_lane_send(struct idc_lane *l, const void *body, uint64_t len)
{
    if (len > l->most_bytes)
        return IDC_TOOBIG;
    if (l->outstanding >= l->most)
        return IDC_AGAIN;
    while (l->tags[l->next] != 0)
        l->next = l->next + 1 < l->most ? l->next + 1 : 0;
    l->uses = l->uses + 1 > 0xFFFF ? 1 : l->uses + 1; /* so that no tag is 0 */
    struct header head = {.kind = MESSAGE, .tag = l->uses << 16 | (l->base + l->next)};
    int rc = idc_wire_send_within(l->wire, &head, sizeof head, body, len, SENDING_NS);
    if (rc != IDC_OK)
        return rc;
    l->tags[l->next] = head.tag;
    l->outstanding++;
    return l->wire->unsent > 0;
}

static bool completes(struct idc_lane *l, struct header head)
{
    uint32_t index = (head.tag & 0xFFFF) - l->base; /* below the base it wraps, and is too large */
    if (index >= l->most || l->tags[index] == 0 || l->tags[index] != head.tag)
        return false;
    l->tags[index] = 0;
    l->outstanding--;
    return true;
}

static bool holds(struct idc_lane *l, struct header head, uint64_t len)
{
    if (len > l->longest || l->holds >= l->quota)
        return false;
    for (uint32_t i = 0; i < l->holds; i++)
        if (l->held[(l->first + i) % l->quota] == head.tag)
            return false;
    l->held[(l->first + l->holds++) % l->quota] = head.tag;
    return true;
}

int64_t idc_lane_take(struct idc_lane *l, void *body, int64_t timeout_ns)
{
    struct idc_wire *w = l->wire;
    bool told = false;
    if (l->left > 0 || l->kept)
        return IDC_LANE_ELSE;
    if (l->found)
        return l->found;
    if (body != NULL)
        idc_wire_into(w, body);
    for (;;) {
        int64_t got = idc_wire_take(w, &l->len, 1, told ? 0 : timeout_ns);
        if (got <= 0)
            return told && (got == IDC_AGAIN || got == IDC_LANE_WANT) ? IDC_LANE_DONE : got; /* the rest is met again */
        struct header head;
        uint64_t rest = w->apart ? w->body_len : l->len - sizeof head;
        if (!w->apart && l->len < sizeof head)
            return l->found = IDC_LANE_OTHER;
        memcpy(&head, w->apart ? w->head : w->in + w->first, sizeof head);
        if (head.flags == 0 && head.kind == DONE && rest == 0 && completes(l, head))
            told = true;
        else
            return l->found = head.flags == 0 && head.kind == MESSAGE && holds(l, head, rest) ? IDC_LANE_MESSAGE : IDC_LANE_OTHER;
    }
}

/* Whether the beginning of a frame is here, at `begin`. Notices before it are taken. */
static bool next(struct idc_lane *l, uint32_t *len, struct header *head)
{
    struct idc_wire *w = l->wire;
    while (w->end - w->begin >= BEGINS) {
        memcpy(len, w->in + w->begin, sizeof *len);
        memcpy(head, w->in + w->begin + sizeof *len, sizeof *head);
        if (head->flags != 0 || head->kind != DONE || *len != sizeof *head || !completes(l, *head))
            return true;
        w->begin += BEGINS;
    }
    return false;
}

/* Whether there is another message, a part of it at least: its reader calls again. What else there is may be the last for long. */
static bool more(struct idc_lane *l)
{
    uint32_t len;
    struct header head;
    if (l->holds > 0 || l->found || l->wire->body != NULL || l->wire->want != 0)
        return true;
    return next(l, &len, &head) ? head.kind == MESSAGE : idc_wire_coming(l->wire);
}

int idc_lane_done(struct idc_lane *l)
{
    struct header head = {.kind = DONE, .tag = l->held[l->first]};
    int rc = l->holds > 0 ? idc_wire_post(l->wire, &head, sizeof head, NULL, 0) : IDC_EINVAL;
    if (rc != IDC_OK)
        return rc;
    l->first = (l->first + 1) % l->quota;
    l->holds--;
    if (2 * ++l->unsaid < l->quota && more(l))
        return IDC_OK;
    l->unsaid = 0;
    return idc_wire_flush(l->wire, 0) == IDC_PEER ? IDC_PEER : IDC_OK;
}

/* Of a long message what is behind it is read where it is to stay, but for how the next one begins: so each takes one call of the
 * kernel, and no copy. Short ones come many at a time. */
static uint64_t ahead(const struct idc_lane *l)
{
    return l->whole < IDC_WIRE_LONG ? l->wire->room : 0;
}

/* Goes into the message whose beginning is here. IDC_OK; IDC_AGAIN: it is not; IDC_LANE_ELSE. Notices are taken. */
static int enter(struct idc_lane *l)
{
    uint32_t len;
    struct header head;
    if (l->wire->body != NULL || l->wire->want != 0)
        return IDC_LANE_ELSE;
    if (!next(l, &len, &head))
        return IDC_AGAIN;
    bool plain = head.flags == 0 && head.kind == MESSAGE && len > sizeof head && len <= l->wire->longest;
    if (!plain || !holds(l, head, len - sizeof head))
        return IDC_LANE_ELSE;
    l->wire->begin += BEGINS;
    l->left = l->whole = len - (uint32_t)sizeof head;
    return IDC_OK;
}

int64_t idc_lane_read(struct idc_lane *l, void *into, uint64_t most, int32_t how, int64_t timeout_ns)
{
    l->got = 0;
    int64_t rc = l->owed ? idc_lane_done(l) : IDC_OK;
    if (rc != IDC_OK && rc != IDC_PEER) /* over; what came before is still to be read */
        return rc;
    l->owed = 0;
    if (l->found || (l->kept && (l->left == 0 || !(how & IDC_LANE_KEEP))))
        return IDC_LANE_ELSE;
    while (l->left == 0 && (rc = enter(l)) != IDC_OK)
        if (rc != IDC_AGAIN || (rc = idc_wire_more(l->wire, BEGINS, ahead(l), timeout_ns)) != IDC_OK)
            return rc;
    if (most == 0)
        return 0;
    uint64_t len = most < l->left ? most : l->left;
    int64_t got = idc_wire_read(l->wire, into, len, how & IDC_LANE_ALL, len < l->left ? 0 : BEGINS + ahead(l), timeout_ns);
    if (got <= 0)
        return got;
    l->got = (uint32_t)got;
    l->left -= (uint32_t)got;
    l->kept = (how & IDC_LANE_KEEP) != 0;
    if (l->left == 0 && !(how & IDC_LANE_KEEP)) {
        rc = idc_lane_done(l);
        l->owed = rc != IDC_OK && rc != IDC_PEER; /* the next call says so, and this one what it has */
        enter(l); /* so that its user knows how long the next one is */
    }
    return got;
}
