//! Threads that look for the next launch for a while before they sleep.
//!
//! A step of few tokens is a hundred launches of some ten microseconds each, and to wake a thread that sleeps takes as long. So the
//! other threads of the pool go on looking for work while launches follow each other closely, as the threads of OpenMP do. They look
//! through the pool itself ([`rayon::yield_now`]), so whatever comes there is found, the products of the `gemm` crate included.

use std::hint::spin_loop;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rayon::Yield;

/// How long threads look for work after a launch has begun, or after they have found some.
const PATIENCE: Duration = Duration::from_micros(500);

/// Until when threads look for work, in nanoseconds of [`now`].
static UNTIL: AtomicU64 = AtomicU64::new(0);

/// Threads that do.
static LOOKING: AtomicUsize = AtomicUsize::new(0);

/// A launch is about to begin.
pub(super) fn stay() {
    UNTIL.store(now() + PATIENCE.as_nanos() as u64, Ordering::Relaxed);
    let others = rayon::current_num_threads().saturating_sub(1);
    if others == 0 || LOOKING.compare_exchange(0, others, Ordering::Relaxed, Ordering::Relaxed).is_err() {
        return;
    }
    // The thread that launches does not wait for launches. If it is none of the pool's, the first of these is spared.
    let mine = rayon::current_thread_index().unwrap_or(0);
    rayon::spawn_broadcast(move |context| {
        if context.index() != mine {
            look();
            LOOKING.fetch_sub(1, Ordering::Relaxed);
        }
    });
}

fn look() {
    let mut until = 0;
    loop {
        let executed = rayon::yield_now() == Some(Yield::Executed);
        let now = now();
        if executed {
            until = now + PATIENCE.as_nanos() as u64;
        } else if now > until.max(UNTIL.load(Ordering::Relaxed)) {
            return;
        } else {
            spin_loop();
        }
    }
}

/// Nanoseconds since the first launch.
fn now() -> u64 {
    static FIRST: OnceLock<Instant> = OnceLock::new();
    FIRST.get_or_init(Instant::now).elapsed().as_nanos() as u64
}
