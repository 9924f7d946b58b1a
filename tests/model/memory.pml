/* The C11 memory model as the ring models see it: views over short histories, for two threads.
 *
 * Depends on nothing. The including model defines NATOM (atomic locations, numbered from 0), NPLAIN (plain locations,
 * numbered from NATOM) and HIST (writes of one location that may be outstanding, the oldest still readable included).
 *
 * Each atomic location keeps its writes in modification order. A thread's view is, for each location, the oldest write
 * it may still read; a load picks any write from there on, so a load may be stale for as long as nothing forbids it.
 *   release store   attaches the writer's view to the write
 *   acquire load    joins the view attached to the write it reads
 *   relaxed store   attaches the view of the last release fence; relaxed load: its view waits for an acquire fence
 *   seq_cst fence   is both fences, and joins the thread's view and the one global view with each other
 * This is RC11 (Lahav et al., PLDI 2017) as run by the ORC11 machine, for locations that have one writer: then
 * modification order is the writer's program order and every store goes to the end. No location here has two writers.
 *
 * Plain locations (payload) have no history: reading one is an error unless the last write happened before, writing one
 * is an error unless every earlier read and write happened before. A data race is thus found in whichever order the two
 * accesses ran, which is also what finds a load that could sink below a later store.
 *
 * Nothing is assumed of x86: no store order, no multi-copy atomicity. Doorbells carry no view at all.
 *
 * squeeze() drops writes that no thread can read any more and renumbers the rest, so that equal situations are equal
 * states and a run may write without bound. It keeps HIST small; an overflow is an assertion, never a lost behaviour.
 */
#define NLOC (NATOM + 2 * NPLAIN)
#define READS(l) ((l) + NPLAIN)	/* shadow of plain location l: how often it was read */
#define P 0			/* the two threads */
#define C 1
#define RELAXED 0
#define ORDERED 1		/* release for a store, acquire for a load */

typedef View { byte t[NLOC] };
byte last[NLOC];		/* index of the newest write */
byte value[NATOM * HIST];
View attached[NATOM * HIST];
byte plain[NPLAIN];
View cur[2];			/* what the thread must see */
View gathered[2];		/* what an acquire fence would add */
View fenced[2];			/* what a relaxed store carries: the view at the last release fence */
View sc;

/* Which ordering this run weakens: 0 none; n the one with that number; n + 100 makes fence n acquire-release only. */
byte mutant;
hidden byte i, j, k, m, at;

#define UNLESS(n) (mutant != (n))
#define AT(l, w) ((l) * HIST + (w))

inline squeeze()
{
	i = 0;
	do
	:: i < NLOC ->
		m = (cur[P].t[i] < cur[C].t[i] -> cur[P].t[i] : cur[C].t[i]);
		if
		:: m == 0
		:: else ->
			last[i] = last[i] - m;
			sc.t[i] = (sc.t[i] > m -> sc.t[i] - m : 0);
			j = 0;
			do
			:: j < 2 ->
				cur[j].t[i] = cur[j].t[i] - m;
				gathered[j].t[i] = (gathered[j].t[i] > m -> gathered[j].t[i] - m : 0);
				fenced[j].t[i] = (fenced[j].t[i] > m -> fenced[j].t[i] - m : 0);
				j++
			:: else -> break
			od;
			j = 0;
			do
			:: j < NATOM * HIST ->
				attached[j].t[i] = (attached[j].t[i] > m -> attached[j].t[i] - m : 0);
				j++
			:: else -> break
			od;
			if
			:: i >= NATOM
			:: else ->
				j = 0;
				do
				:: j < HIST ->
					if
					:: j + m < HIST -> value[AT(i, j)] = value[AT(i, j + m)]
					:: else -> value[AT(i, j)] = 0
					fi;
					k = 0;
					do
					:: k < NLOC ->
						if
						:: j + m < HIST -> attached[AT(i, j)].t[k] = attached[AT(i, j + m)].t[k]
						:: else -> attached[AT(i, j)].t[k] = 0
						fi;
						k++
					:: else -> break
					od;
					j++
				:: else -> break
				od
			fi
		fi;
		i++
	:: else -> break
	od;
	i = 0; j = 0; k = 0; m = 0; at = 0
}

inline store(me, l, v, order)
{
	d_step {
		assert(last[l] + 1 < HIST);	/* the bound of this run, not a fault of the protocol */
		last[l] = last[l] + 1;
		cur[me].t[l] = last[l];
		at = AT(l, last[l]);
		value[at] = v;
		i = 0;
		do
		:: i < NLOC -> attached[at].t[i] = ((order) == ORDERED -> cur[me].t[i] : fenced[me].t[i]); i++
		:: else -> break
		od;
		attached[at].t[l] = last[l];
		squeeze()
	}
}

inline load(me, l, result, order)
{
	atomic {
		at = cur[me].t[l];
		do
		:: at < last[l] -> at++
		:: break
		od;
		skip;
		d_step {
			cur[me].t[l] = at;
			at = AT(l, at);
			result = value[at];
			i = 0;
			do
			:: i < NLOC ->
				if
				:: attached[at].t[i] > gathered[me].t[i] -> gathered[me].t[i] = attached[at].t[i]
				:: else
				fi;
				if
				:: (order) == ORDERED && attached[at].t[i] > cur[me].t[i] -> cur[me].t[i] = attached[at].t[i]
				:: else
				fi;
				i++
			:: else -> break
			od;
			squeeze()
		}
	}
}

/* A seq_cst fence; mutant n leaves it out, mutant n + 100 leaves an acquire-release fence. */
inline fence(me, n)
{
	d_step {
		i = 0;
		do
		:: i < NLOC && mutant != n ->
			if
			:: gathered[me].t[i] > cur[me].t[i] -> cur[me].t[i] = gathered[me].t[i]
			:: else
			fi;
			if
			:: mutant != n + 100 && sc.t[i] > cur[me].t[i] -> cur[me].t[i] = sc.t[i]
			:: else
			fi;
			if
			:: mutant != n + 100 -> sc.t[i] = cur[me].t[i]
			:: else
			fi;
			fenced[me].t[i] = cur[me].t[i];
			i++
		:: else -> break
		od;
		squeeze()
	}
}

inline release_fence(me, n)
{
	d_step {
		i = 0;
		do
		:: i < NLOC && mutant != n -> fenced[me].t[i] = cur[me].t[i]; i++
		:: else -> break
		od;
		squeeze()
	}
}

inline plain_write(me, l, v)
{
	d_step {
		assert(cur[me].t[l] == last[l]);		/* every earlier write happened before */
		assert(cur[me].t[READS(l)] == last[READS(l)]);	/* and every earlier read: nothing unread is overwritten */
		last[l] = last[l] + 1;
		cur[me].t[l] = last[l];
		plain[(l) - NATOM] = v;
		squeeze()
	}
}

inline plain_read(me, l, result)
{
	d_step {
		assert(cur[me].t[l] == last[l]);		/* the write happened before: not torn, not stale */
		last[READS(l)] = last[READS(l)] + 1;
		cur[me].t[READS(l)] = last[READS(l)];
		result = plain[(l) - NATOM];
		squeeze()
	}
}

/* An eventfd: a counter that a read sets to zero, so only zero or not matters. Carries no view. */
inline ring(bell)
{
	bell = 1
}

inline choose_mutant()
{
	c_code { now.mutant = getenv("MUTANT") ? atoi(getenv("MUTANT")) : 0; }
}
