//! The same work on many things at once.

use std::num::NonZeroUsize;
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

/// What the work makes of each item, in their order, by as many threads as the machine has. Each of these begins with something of its own.
pub(crate) fn each<T: Sync, S, R: Send>(
    items: &[T],
    begin: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, &T) -> R + Sync,
) -> Vec<R> {
    let next = AtomicUsize::new(0);
    let worker = || {
        let (mut own, mut made) = (begin(), Vec::new());
        loop {
            let n = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(n) else { return made };
            made.push((n, work(&mut own, item)));
        }
    };
    let count = thread::available_parallelism().map_or(1, NonZeroUsize::get).min(items.len());
    let mut all = Vec::with_capacity(items.len());
    thread::scope(|scope| {
        let workers: Vec<_> = (0..count).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().for_each(|w| all.extend(w.join().unwrap_or_else(|panic| resume_unwind(panic))));
    });
    all.sort_by_key(|(n, _)| *n);
    all.into_iter().map(|(_, made)| made).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_made_stands_in_the_order_of_the_items() {
        let items: Vec<u32> = (0..100).collect();
        let squares = each(&items, || 0, |_, n| n * n);
        assert_eq!(squares, items.iter().map(|n| n * n).collect::<Vec<_>>());
        assert!(each(&[0u32; 0], || (), |(), n| *n).is_empty());
    }
}
