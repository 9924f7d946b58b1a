/* The byte ring: free-running tail and head, event index both ways, sleep and wake-up for several bytes at once.
 *
 * Checked: every byte is read once, in order, whole, and never overwritten before; nobody sleeps for ever; an index never
 * goes back nor out of bounds as the other side sees it; at the end everything was delivered. No timer is modelled.
 * Both sides move any number of bytes that is possible, and wait for any number up to half the ring.
 */
#ifndef SIZE
#define SIZE 4
#endif
#ifndef TOTAL
#define TOTAL 5
#endif
#ifndef HIST
#define HIST 8
#endif
#define NATOM 5
#define NPLAIN SIZE
#define TAIL 0
#define HEAD 1
#define DATA_EVENT 2
#define SPACE_EVENT 3
#define P_STATE 4
#define BYTE(n) (NATOM + (n) % SIZE)

/* mutants */
#define TAIL_PUBLISH 1		/* release: bytes before the tail that covers them | relaxed */
#define TAIL_LOOK 2		/* acquire: tail before its bytes | relaxed */
#define TAIL_RECHECK 3		/* acquire: the same after arming | relaxed */
#define HEAD_PUBLISH 4		/* release: reading bytes before giving them back | relaxed */
#define HEAD_LOOK 5		/* acquire: bytes given back before they are written again | relaxed */
#define HEAD_RECHECK 6		/* acquire: the same after arming | relaxed */
#define DATA_NOTIFY_FENCE 7	/* fence: tail before reading data_event | none */
#define DATA_ARM_FENCE 8	/* fence: data_event before looking again | none */
#define SPACE_NOTIFY_FENCE 9	/* fence: head before reading space_event | none */
#define SPACE_ARM_FENCE 10	/* fence: space_event before looking again | none */
#define CLOSE_PUBLISH 11	/* release, redundant: last tail before the closed state; the fence of the notify between them does it | relaxed */
#define CLOSE_LOOK 12		/* acquire: closed state before the last look | relaxed */
#define CLOSE_FENCE 13		/* fence: closed state before its doorbell | none */
#define NO_DATA_RECHECK 20	/* steps: consumer sleeps without looking again */
#define NO_SPACE_RECHECK 21	/* steps: producer sleeps without looking again */
#define NO_LAST_LOOK 22		/* steps: closed is believed without a last look at the tail */
#define NEED_ALL 23		/* steps: a side may wait for more than half the ring */
#define LATE_EVENT 24		/* steps: interval (old, new] taken as (old, new) */
#define RING_ON_EQUAL 25	/* steps: rings only if the event is exactly the new index */

#include "memory.pml"

bit data_bell, space_bell;

#define ORDER(n) (mutant == (n) -> RELAXED : ORDERED)
#define CROSSED(event, old, new) (event > old && \
	((event < new && UNLESS(RING_ON_EQUAL)) || (event == new && UNLESS(LATE_EVENT))))
#define HALF (mutant == NEED_ALL -> SIZE : SIZE / 2)

inline refresh_head(order)
{
	load(P, HEAD, seen, order);
	d_step { assert(seen >= head && seen <= tail); head = seen; seen = 0 }
}

proctype producer()
{
	byte tail, head, old, event, seen, need, room;

	do
	:: tail < TOTAL ->
		/* waits for `need` free bytes, 1 to half the ring */
		need = 1;
		do
		:: need < HALF && tail + need < TOTAL -> need++
		:: break
		od;
		if
		:: SIZE - (tail - head) < need -> refresh_head(ORDER(HEAD_LOOK))
		:: else
		fi;
		do
		:: SIZE - (tail - head) < need ->
			store(P, SPACE_EVENT, tail + need - SIZE, RELAXED);
			fence(P, SPACE_ARM_FENCE);
			if
			:: UNLESS(NO_SPACE_RECHECK) -> refresh_head(ORDER(HEAD_RECHECK))
			:: else
			fi;
			if
			:: SIZE - (tail - head) < need -> atomic { space_bell -> space_bell = 0 }
			:: else
			fi;
			if
			:: mutant == NO_SPACE_RECHECK -> refresh_head(ORDER(HEAD_LOOK))
			:: else
			fi
		:: else -> break
		od;
		old = tail;
		room = SIZE - (tail - head);
		do
		:: room > 0 && tail < TOTAL -> plain_write(P, BYTE(tail), tail + 1); tail++; room--
		:: tail > old -> break
		od;
		room = 0; need = 0;
		store(P, TAIL, tail, ORDER(TAIL_PUBLISH));
		fence(P, DATA_NOTIFY_FENCE);
		atomic {
			load(P, DATA_EVENT, event, RELAXED);
			if
			:: CROSSED(event, old, tail) -> ring(data_bell)
			:: else
			fi;
			event = 0; old = 0
		}
	:: else -> break
	od;
	store(P, P_STATE, 1, ORDER(CLOSE_PUBLISH));
	fence(P, CLOSE_FENCE);
	ring(data_bell)
}

inline refresh_tail(order)
{
	load(C, TAIL, seen, order);
	d_step { assert(seen >= tail && seen <= head + SIZE); tail = seen; seen = 0 }
}

proctype consumer()
{
	byte head, tail, old, event, seen, need, got, closed;

	do
	:: true ->
		need = 1;
		do
		:: need < HALF -> need++
		:: break
		od;
		if
		:: tail - head < need -> refresh_tail(ORDER(TAIL_LOOK))
		:: else
		fi;
		do
		:: tail - head < need && !closed ->
			store(C, DATA_EVENT, head + need, RELAXED);
			fence(C, DATA_ARM_FENCE);
			if
			:: UNLESS(NO_DATA_RECHECK) -> refresh_tail(ORDER(TAIL_RECHECK))
			:: else
			fi;
			if
			:: tail - head < need ->
				load(C, P_STATE, closed, ORDER(CLOSE_LOOK));
				if
				:: closed && UNLESS(NO_LAST_LOOK) -> refresh_tail(ORDER(TAIL_LOOK))
				:: closed && mutant == NO_LAST_LOOK
				:: else ->
					atomic { data_bell -> data_bell = 0 };
					if
					:: mutant == NO_DATA_RECHECK -> refresh_tail(ORDER(TAIL_LOOK))
					:: else
					fi
				fi
			:: else
			fi
		:: else -> break
		od;
		need = 0;
		if
		:: tail == head -> break
		:: else
		fi;
		old = head;
		do
		:: tail > head ->
			plain_read(C, BYTE(head), got);
			assert(got == head + 1);
			d_step { head++; got = 0 }
		:: head > old -> break
		od;
		store(C, HEAD, head, ORDER(HEAD_PUBLISH));
		fence(C, SPACE_NOTIFY_FENCE);
		atomic {
			load(C, SPACE_EVENT, event, RELAXED);
			if
			:: CROSSED(event, old, head) -> ring(space_bell)
			:: else
			fi;
			event = 0; old = 0
		}
	od;
	assert(head == TOTAL)
}

init {
	choose_mutant();
	atomic { run producer(); run consumer() }
}
