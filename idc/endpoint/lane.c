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

enum { MESSAGE = 2, DONE = 3 };

int idc_lane_send(struct idc_lane *l, const void *body, uint64_t len)
{
    if (l->outstanding >= l->most)
        return IDC_AGAIN;
    while (l->tags[l->next] != 0)
        l->next = l->next + 1 < l->most ? l->next + 1 : 0;
    l->uses = l->uses + 1 > 0xFFFF ? 1 : l->uses + 1; /* so that no tag is 0 */
    struct header head = {.kind = MESSAGE, .tag = l->uses << 16 | (l->base + l->next)};
    int rc = idc_wire_send(l->wire, &head, sizeof head, body, len);
    if (rc != IDC_OK)
        return rc;
    l->tags[l->next] = head.tag;
    l->outstanding++;
    return IDC_OK;
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
    if (body != NULL)
        idc_wire_into(w, body);
    for (;;) {
        int64_t got = idc_wire_take(w, &l->len, 1, told ? 0 : timeout_ns);
        if (got <= 0)
            return told && (got == IDC_AGAIN || got == IDC_LANE_WANT) ? IDC_LANE_DONE : got; /* the rest is met again */
        struct header head;
        uint64_t rest = w->apart ? w->body_len : l->len - sizeof head;
        if (!w->apart && l->len < sizeof head)
            return IDC_LANE_OTHER;
        memcpy(&head, w->apart ? w->head : w->in + w->first, sizeof head);
        if (head.flags == 0 && head.kind == DONE && rest == 0 && completes(l, head))
            told = true;
        else
            return head.flags == 0 && head.kind == MESSAGE && holds(l, head, rest) ? IDC_LANE_MESSAGE : IDC_LANE_OTHER;
    }
}

int idc_lane_done(struct idc_lane *l)
{
    struct header head = {.kind = DONE, .tag = l->held[l->first]};
    int rc = l->holds > 0 ? idc_wire_post(l->wire, &head, sizeof head, NULL, 0) : IDC_EINVAL;
    if (rc != IDC_OK)
        return rc;
    l->first = (l->first + 1) % l->quota;
    l->holds--;
    if (2 * ++l->unsaid < l->quota && (l->holds > 0 || idc_wire_ready(l->wire) || idc_wire_coming(l->wire)))
        return IDC_OK;
    l->unsaid = 0;
    return idc_wire_flush(l->wire, 0) == IDC_PEER ? IDC_PEER : IDC_OK;
}
