/* The message ring: slots that the consumer polls, event index both ways, sleep and wake-up, batches, close by either side.
 *
 * Checked: payload is read once, in order, whole, and never overwritten before; nobody sleeps for ever (spin's invalid
 * end states); at the end everything sent before the close was delivered. No timer and no safety recheck is modelled.
 * Polling is not modelled as a loop: a poll changes nothing, and each look may be stale anyway.
 */
#ifndef SLOTS
#define SLOTS 2
#endif
#ifndef ITEMS
#define ITEMS 4
#endif
#ifndef HIST
#define HIST 6
#endif
#define NATOM (SLOTS + 5)
#define NPLAIN SLOTS
#define SLOT(n) ((n) % SLOTS)
#define HEAD SLOTS
#define DATA_EVENT (SLOTS + 1)
#define SPACE_EVENT (SLOTS + 2)
#define P_STATE (SLOTS + 3)
#define C_STATE (SLOTS + 4)
#define PAYLOAD(n) (NATOM + (n) % SLOTS)

/* mutants */
#define SLOT_PUBLISH 1		/* release: payload before its seq | relaxed */
#define SLOT_LOOK 2		/* acquire: seq before its payload | relaxed */
#define SLOT_RECHECK 3		/* acquire: the same after arming | relaxed */
#define HEAD_PUBLISH 4		/* release: reading the payload before giving its slot back | relaxed */
#define HEAD_LOOK 5		/* acquire: slot given back before it is written again | relaxed */
#define HEAD_RECHECK 6		/* acquire: the same after arming | relaxed */
#define DATA_NOTIFY_FENCE 7	/* fence: seq before reading data_event | none */
#define DATA_ARM_FENCE 8	/* fence: data_event before looking again | none */
#define SPACE_NOTIFY_FENCE 9	/* fence: head before reading space_event | none */
#define SPACE_ARM_FENCE 10	/* fence: space_event before looking again | none */
#define CLOSE_PUBLISH 11	/* release: last items before the closed state | relaxed */
#define CLOSE_LOOK 12		/* acquire: closed state before the last look | relaxed */
#define CLOSE_FENCE 13		/* fence: closed state before its doorbell | none */
#define NO_DATA_RECHECK 20	/* steps: consumer sleeps without looking again */
#define NO_SPACE_RECHECK 21	/* steps: producer sleeps without looking again */
#define NO_LAST_LOOK 22		/* steps: closed is believed without a last look at the ring */
#define SLEEP_UNFLUSHED_P 23	/* steps: producer sleeps before telling of its batch */
#define SLEEP_UNFLUSHED_C 24	/* steps: consumer sleeps before giving slots back */
#define LATE_EVENT 25		/* steps: interval (old, new] taken as (old, new) */
#define RING_ON_EQUAL 26	/* steps: rings only if the event is exactly the new index */
#define NO_STATE_RECHECK 27	/* steps: state is not looked at after arming */

#include "memory.pml"

bit data_bell, space_bell;
byte delivered;
bool reader_left;

#define ORDER(n) (mutant == (n) -> RELAXED : ORDERED)
#define CROSSED(event, old, new) (event > old && \
	((event < new && UNLESS(RING_ON_EQUAL)) || (event == new && UNLESS(LATE_EVENT))))

inline tell_data()
{
	if
	:: told != tail ->
		fence(P, DATA_NOTIFY_FENCE);
		atomic {
			load(P, DATA_EVENT, event, RELAXED);
			if
			:: CROSSED(event, told, tail) -> ring(data_bell)
			:: else
			fi;
			told = tail; event = 0
		}
	:: else
	fi
}

proctype producer()
{
	byte tail, told, head, event, closed;

	do
	:: tail < ITEMS ->
		if
		:: tail - head == SLOTS -> load(P, HEAD, head, ORDER(HEAD_LOOK))
		:: else
		fi;
		load(P, C_STATE, closed, ORDERED);
		if
		:: closed -> goto done
		:: !closed && tail - head == SLOTS ->
			if
			:: UNLESS(SLEEP_UNFLUSHED_P) -> tell_data()
			:: else
			fi;
			store(P, SPACE_EVENT, head + 1, RELAXED);
			fence(P, SPACE_ARM_FENCE);
			load(P, HEAD, head, ORDER(HEAD_RECHECK));
			if
			:: UNLESS(NO_STATE_RECHECK) -> load(P, C_STATE, closed, ORDERED)
			:: else
			fi;
			if
			:: !closed && (tail - head == SLOTS || mutant == NO_SPACE_RECHECK) -> atomic { space_bell -> space_bell = 0 }
			:: else
			fi
		:: else ->
			plain_write(P, PAYLOAD(tail), tail + 1);
			store(P, SLOT(tail), tail + 1, ORDER(SLOT_PUBLISH));
			tail++;
			if
			:: tell_data()
			:: skip		/* a batch */
			fi
		fi
	:: else -> break
	od;
	if
	:: tell_data()
	:: skip		/* the doorbell of the close tells */
	fi;
	store(P, P_STATE, 1, ORDER(CLOSE_PUBLISH));
	fence(P, CLOSE_FENCE);
	ring(data_bell);
done:	skip
}

inline tell_space()
{
	if
	:: told != head ->
		store(C, HEAD, head, ORDER(HEAD_PUBLISH));
		fence(C, SPACE_NOTIFY_FENCE);
		atomic {
			load(C, SPACE_EVENT, event, RELAXED);
			if
			:: CROSSED(event, told, head) -> ring(space_bell)
			:: else
			fi;
			told = head; event = 0
		}
	:: else
	fi
}

#define PRESENT (seq == head + 1)
#define LAP_BEFORE (head + 1 > SLOTS -> head + 1 - SLOTS : 0)

proctype consumer()
{
	byte head, told, event, seq, closed, got;

	do
	:: skip ->
		load(C, SLOT(head), seq, ORDER(SLOT_LOOK));
		assert(PRESENT || seq == LAP_BEFORE);
		if
		:: PRESENT
		:: else ->
			load(C, P_STATE, closed, ORDER(CLOSE_LOOK));
			if
			:: closed && UNLESS(NO_LAST_LOOK) -> load(C, SLOT(head), seq, ORDER(SLOT_LOOK))
			:: else
			fi
		fi;
		if
		:: PRESENT ->
take:			plain_read(C, PAYLOAD(head), got);
			assert(got == head + 1);
			d_step { head++; delivered = head; got = 0; seq = 0 };
			if
			:: tell_space()
			:: skip		/* gives several slots back at once */
			:: reader_left = true; break
			fi
		:: !PRESENT && closed -> break
		:: else ->
			if
			:: UNLESS(SLEEP_UNFLUSHED_C) -> tell_space()
			:: else
			fi;
			store(C, DATA_EVENT, head + 1, RELAXED);
			fence(C, DATA_ARM_FENCE);
			load(C, SLOT(head), seq, ORDER(SLOT_RECHECK));
			if
			:: PRESENT && UNLESS(NO_DATA_RECHECK) -> goto take
			:: else
			fi;
			if
			:: UNLESS(NO_STATE_RECHECK) -> load(C, P_STATE, closed, ORDER(CLOSE_LOOK))
			:: else
			fi;
			if
			:: closed
			:: else -> atomic { data_bell -> data_bell = 0 }
			fi
		fi
	od;
	assert(reader_left || delivered == ITEMS);
	store(C, C_STATE, 1, ORDERED);
	fence(C, CLOSE_FENCE);
	ring(space_bell)
}

init {
	choose_mutant();
	atomic { run producer(); run consumer() }
}
