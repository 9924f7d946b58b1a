/* The attach handshake, with a message ring behind it: side A (thread P) sends to side B (thread C), and either may
 * crash between any two shared stores, CRASHES times in all, and start again.
 *
 * Checked: what is delivered was sent in this connection, to this incarnation, in order, whole; a restart is never
 * taken for corruption; who believes to be connected was acknowledged by the very peer it names; when nobody crashes any
 * more both end up connected to each other with everything delivered, and asleep (the monitor), with no timer.
 * A doorbell rung while the other side is down may be lost; one pending at a crash may be lost.
 * One slot only, so that the second item needs space that the consumer gave back.
 */
#ifndef CRASHES
#define CRASHES 1
#endif
#ifndef ITEMS
#define ITEMS 2
#endif
#ifndef HIST
#define HIST 8
#endif
#define NATOM 10
#define NPLAIN 1
#define EPOCH(side) (side)
#define ACK(side) (2 + (side))
#define STATE(side) (4 + (side))
#define SLOT 6
#define HEAD 7
#define DATA_EVENT 8
#define SPACE_EVENT 9
#define PAYLOAD NATOM
#define ABSENT 0
#define OPEN 1

/* mutants */
#define ABSENT_PUBLISH 1	/* release, redundant: the release of the epoch that follows covers it | relaxed */
#define EPOCH_PUBLISH 2		/* release: cleared acknowledgement and state before the new epoch | relaxed */
#define RESET_PUBLISH 3		/* release: new epoch before each reset word | relaxed */
#define OPEN_PUBLISH 4		/* release, redundant: the acknowledgement that follows covers the reset words | relaxed */
#define ACK_PUBLISH 5		/* release, redundant: only if LOOK_FENCE is there; see TIMER | relaxed */
#define EPOCH_LOOK 6		/* acquire: peer's epoch before its acknowledgement and state | relaxed */
#define ACK_LOOK 7		/* acquire: acknowledgement before the peer's ring words | relaxed */
#define STATE_LOOK 8		/* acquire, redundant: the acknowledgement covers it | relaxed */
#define SLOT_LOOK 9		/* acquire: slot word before its payload and the watch words | relaxed */
#define HEAD_LOOK 10		/* acquire: head before the next payload and the watch words | relaxed */
#define BELL_FENCE 11		/* fence: own words before the doorbell of the handshake | none */
#define LOOK_FENCE 12		/* fence: doorbell before looking at the peer's words | none */
#define KEEP_ACK 20		/* steps: the acknowledgement is not cleared at attach */
#define KEEP_STATE 21		/* steps, redundant: state stays OPEN during a reset; the acknowledgement is cleared anyway */
#define RESET_FIRST 22		/* steps: words are reset before the new epoch is stored */
#define RESET_NOTHING 23	/* steps: ring words are not reset */
#define RESET_PAYLOAD 24	/* steps: the reset also writes the payload */
#define ACK_BEFORE_EPOCH 25	/* steps: acknowledgement is read before the epoch */
#define NO_SECOND_EPOCH 26	/* steps: the epoch is not read again after acknowledgement and state */
#define NO_WATCH 27		/* steps: connected sides do not watch the peer's epoch and state */
#define UP_LATE 28		/* steps: doorbells are enabled after the first look */
#define NO_BELL_AT_ATTACH 29	/* steps, redundant: a side that opened does not ring; whoever sees the other acknowledges and rings */
#define NO_BELL_AT_ACK 30	/* steps: a side that acknowledged does not ring */
#define SAME_EPOCH 31		/* steps: a side that starts again uses its old epoch */

#include "memory.pml"

/* With TIMER: sides look again on a timer while they attach, and the handshake has no fences. Then safety alone is checked,
 * and the releases and acquires must carry it. */
#ifdef TIMER
#define HANDSHAKE_FENCE(me, n) skip
#define WAIT(me) bell[me] = 0
#else
#define HANDSHAKE_FENCE(me, n) fence(me, n)
#define WAIT(me) atomic { bell[me] -> bell[me] = 0 }
#endif
#define ARM_FENCE 99	/* those of the rings: see message_ring.pml */
#define NOTIFY_FENCE 99

#define ORDER(n) (mutant == (n) -> RELAXED : ORDERED)
/* An acknowledgement; the model alone adds who stored it, which the protocol does not look at. */
#define SIGNED(side, acked) ((acked) + 8 * epoch[side])
#define OTHER(side) (1 - (side))

bit bell[2], up[2];
byte crashes;
byte epoch[2];		/* of this incarnation; 1, 2, ... stand for random ones */
byte joined[2];		/* epoch of the peer that this side is connected to, or 0 */
byte count[2];		/* items sent, received in this connection */

inline maybe_crash(me)
{
	if
	:: true
	:: atomic {
		crashes < CRASHES ->
		crashes++;
		up[me] = 0;
		if
		:: bell[me] = 0
		:: true
		fi;
		goto start
	   }
	fi
}

inline ring_peer(me)
{
	atomic {
		if
		:: bell[OTHER(me)] = 1
		:: !up[OTHER(me)]
		fi
	}
}

/* The words that this side writes in the rings. */
inline reset(me)
{
	if
	:: mutant == RESET_NOTHING
	:: mutant != RESET_NOTHING && me == P ->
		maybe_crash(me);
		store(me, SLOT, 0, ORDER(RESET_PUBLISH));
		maybe_crash(me);
		store(me, SPACE_EVENT, 0, ORDER(RESET_PUBLISH));
		if
		:: mutant == RESET_PAYLOAD -> plain_write(me, PAYLOAD, 0)
		:: else
		fi
	:: mutant != RESET_NOTHING && me == C ->
		maybe_crash(me);
		store(me, HEAD, 0, ORDER(RESET_PUBLISH));
		maybe_crash(me);
		store(me, DATA_EVENT, 0, ORDER(RESET_PUBLISH))
	fi
}

inline look(me)
{
	HANDSHAKE_FENCE(me, LOOK_FENCE);
	if
	:: mutant == ACK_BEFORE_EPOCH -> load(me, ACK(OTHER(me)), ack, ORDERED)
	:: else
	fi;
	load(me, EPOCH(OTHER(me)), seen, ORDER(EPOCH_LOOK));
	changed = (seen != 0 && seen != peer);
	if
	:: changed ->
		peer = seen;
		maybe_crash(me);
		store(me, ACK(me), SIGNED(me, peer), ORDER(ACK_PUBLISH))
	:: else
	fi;
	if
	:: mutant == ACK_BEFORE_EPOCH
	:: else -> load(me, ACK(OTHER(me)), ack, ORDER(ACK_LOOK))
	fi;
	load(me, STATE(OTHER(me)), state, ORDER(STATE_LOOK));
	if
	:: UNLESS(NO_SECOND_EPOCH) -> load(me, EPOCH(OTHER(me)), seen, RELAXED)
	:: else
	fi;
	atomic {
		if
		:: peer != 0 && ack % 8 == epoch[me] && state == OPEN && seen == peer ->
			joined[me] = peer;
			assert(ack / 8 == peer)
		:: else
		fi;
		ack = 0; state = 0; seen = 0
	}
}

inline attach(me)
{
	if
	:: mutant != SAME_EPOCH || epoch[me] == 0 -> epoch[me] = epoch[me] + 1
	:: else
	fi;
	assert(epoch[me] < 8);
	joined[me] = 0; count[me] = 0; peer = 0;
	if
	:: UNLESS(KEEP_ACK) ->
		maybe_crash(me);
		store(me, ACK(me), 0, ORDERED)
	:: else
	fi;
	if
	:: UNLESS(KEEP_STATE) ->
		maybe_crash(me);
		store(me, STATE(me), ABSENT, ORDER(ABSENT_PUBLISH))
	:: else
	fi;
	if
	:: mutant == RESET_FIRST -> reset(me)
	:: else
	fi;
	maybe_crash(me);
	store(me, EPOCH(me), epoch[me], ORDER(EPOCH_PUBLISH));
	if
	:: mutant == RESET_FIRST
	:: else -> reset(me)
	fi;
	maybe_crash(me);
	store(me, STATE(me), OPEN, ORDER(OPEN_PUBLISH));
	if
	:: UNLESS(NO_BELL_AT_ATTACH) ->
		HANDSHAKE_FENCE(me, BELL_FENCE);
		maybe_crash(me);
		ring_peer(me)
	:: else
	fi;
	do
	:: true ->
		look(me);
		if
		:: changed && UNLESS(NO_BELL_AT_ACK) ->
			HANDSHAKE_FENCE(me, BELL_FENCE);
			maybe_crash(me);
			ring_peer(me)
		:: else
		fi;
		if
		:: joined[me] -> break
		:: else ->
			if
			:: mutant == UP_LATE -> up[me] = 1
			:: else
			fi;
			WAIT(me)
		fi
	od
}

/* Is the connection over? */
inline watch(me)
{
	if
	:: mutant == NO_WATCH
	:: else ->
		load(me, EPOCH(OTHER(me)), seen, ORDERED);
		load(me, STATE(OTHER(me)), state, ORDERED);
		ended = (seen != peer || state != OPEN);
		atomic { seen = 0; state = 0 }
	fi
}

#define TAG(n) (epoch[P] * 32 + joined[P] * 4 + (n))

proctype sender()
{
	byte peer, seen, ack, state, head, event;
	bool changed, ended;

start:	if
	:: mutant != UP_LATE -> up[P] = 1
	:: else
	fi;
again:	attach(P);
	head = 0; ended = false;
	do
	:: count[P] < ITEMS ->
		if
		:: count[P] == head + 1 ->
			maybe_crash(P);
			store(P, SPACE_EVENT, head + 1, RELAXED);
			fence(P, ARM_FENCE);
			load(P, HEAD, seen, ORDER(HEAD_LOOK));
			if
			:: seen < head || seen > count[P] -> watch(P); assert(ended)
			:: seen == head -> watch(P)
			:: else -> head = seen
			fi;
			seen = 0;
			if
			:: ended -> break
			:: !ended && count[P] == head + 1 -> atomic { bell[P] -> bell[P] = 0 }
			:: else
			fi
		:: else ->
			plain_write(P, PAYLOAD, TAG(count[P]));
			maybe_crash(P);
			d_step { count[P] = count[P] + 1 };
			store(P, SLOT, count[P], ORDERED);
			maybe_crash(P);
			fence(P, NOTIFY_FENCE);
			load(P, DATA_EVENT, event, RELAXED);
			if
			:: event == count[P] -> ring_peer(P)
			:: else
			fi;
			event = 0
		fi
	:: else ->
		/* all sent: sleeps until the peer starts again */
		fence(P, ARM_FENCE);
		watch(P);
		if
		:: ended -> break
		:: else -> atomic { bell[P] -> bell[P] = 0 }
		fi
	od;
	goto again
}

proctype receiver()
{
	byte peer, seen, ack, state, event, got;
	bool changed, ended;

start:	if
	:: mutant != UP_LATE -> up[C] = 1
	:: else
	fi;
again:	attach(C);
	ended = false;
	do
	:: true ->
		load(C, SLOT, seen, ORDER(SLOT_LOOK));
		if
		:: seen == count[C] + 1 ->
take:			plain_read(C, PAYLOAD, got);
			assert(got == joined[C] * 32 + epoch[C] * 4 + count[C]);
			d_step { got = 0; seen = 0; count[C] = count[C] + 1 };
			maybe_crash(C);
			store(C, HEAD, count[C], ORDERED);
			maybe_crash(C);
			fence(C, NOTIFY_FENCE);
			load(C, SPACE_EVENT, event, RELAXED);
			if
			:: event == count[C] -> ring_peer(C)
			:: else
			fi;
			event = 0
		:: else ->
			if
			:: seen != count[C] -> watch(C); assert(ended); break
			:: else
			fi;
			maybe_crash(C);
			store(C, DATA_EVENT, count[C] + 1, RELAXED);
			fence(C, ARM_FENCE);
			load(C, SLOT, seen, ORDER(SLOT_LOOK));
			if
			:: seen == count[C] + 1 -> goto take
			:: else
			fi;
			watch(C);
			if
			:: ended -> break
			:: else -> atomic { bell[C] -> bell[C] = 0 }
			fi
		fi
	od;
	goto again
}

/* Runs when nothing else can. */
proctype monitor()
{
#ifdef TIMER
	false;
#endif
	timeout -> assert(joined[P] == epoch[C] && joined[C] == epoch[P] && count[P] == ITEMS && count[C] == ITEMS)
}

init {
	choose_mutant();
	atomic { run sender(); run receiver(); run monitor() }
}
