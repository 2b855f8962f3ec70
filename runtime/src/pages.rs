//! Which pages of a pool belong to which sequence.

/// Tables are as long as so many positions need, or a multiple: what follows from their length is found out anew that seldom.
const POSITIONS: usize = 256;

/// The pages of a batch of sequences. Those that are given back are the next to be taken.
#[derive(Clone, Debug)]
pub(crate) struct Pages {
    /// Positions of a page.
    page: usize,
    /// Pages that no sequence has.
    free: Vec<usize>,
    /// How many sequences have each page.
    owners: Vec<usize>,
    /// The pages of each sequence, in the order of its positions.
    of: Vec<Vec<usize>>,
}

impl Pages {
    /// Pages of so many positions, all of them free.
    pub(crate) fn new(page: usize, pages: usize, sequences: usize) -> Pages {
        Pages {
            page,
            free: (0..pages).rev().collect(),
            owners: vec![0; pages],
            of: vec![Vec::new(); sequences],
        }
    }

    /// All pages there are.
    pub(crate) fn all(&self) -> usize {
        self.owners.len()
    }

    /// Pages that sequences have.
    pub(crate) fn taken(&self) -> usize {
        self.all() - self.free.len()
    }

    /// Takes pages for positions of a sequence that are about to be written.
    ///
    /// # Errors
    /// If there is no page left, or another sequence has a page that would be written to.
    pub(crate) fn write(&mut self, sequence: usize, positions: &[i32]) -> Result<(), String> {
        let page = self.page;
        for &position in positions {
            let number = position as usize / page;
            while self.of[sequence].len() <= number {
                let Some(next) = self.free.pop() else {
                    return Err(format!(
                        "the pool has {} pages of {page} positions, and none is left for position {position} of sequence {sequence}; give it \
                         more with --cache-pool",
                        self.all()
                    ));
                };
                self.owners[next] = 1;
                self.of[sequence].push(next);
            }
            if self.owners[self.of[sequence][number]] > 1 {
                return Err(format!(
                    "position {position} of sequence {sequence} lies in a page that another sequence has, too, and cannot be written again"
                ));
            }
        }
        Ok(())
    }

    /// Gives the pages of a sequence back.
    pub(crate) fn end(&mut self, sequence: usize) {
        for page in std::mem::take(&mut self.of[sequence]) {
            self.owners[page] -= 1;
            if self.owners[page] == 0 {
                self.free.push(page);
            }
        }
    }

    /// Has a sequence begin with the pages of another, but for its last, which that may still write to. Gives the number of positions.
    pub(crate) fn fork(&mut self, from: usize, to: usize) -> usize {
        self.end(to);
        let shared = self.of[from].len().saturating_sub(1);
        let pages = self.of[from][..shared].to_vec();
        pages.iter().for_each(|&page| self.owners[page] += 1);
        self.of[to] = pages;
        shared * self.page
    }

    /// How long a row of the table for so many positions is.
    pub(crate) fn width(&self, positions: usize) -> usize {
        positions.max(1).next_multiple_of(POSITIONS.max(self.page)) / self.page
    }

    /// The table for so many positions, one row for each sequence. Behind what a sequence has, it may be any page: nothing sees what is
    /// there.
    pub(crate) fn table(&self, positions: usize) -> Vec<i32> {
        let width = self.width(positions);
        let row = |pages: &Vec<usize>| {
            let pages = pages.iter().map(|&page| page as i32).chain(std::iter::repeat(0));
            pages.take(width).collect::<Vec<_>>()
        };
        self.of.iter().flat_map(row).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_taken_as_sequences_grow_and_used_again() {
        let mut pages = Pages::new(4, 3, 2);
        pages.write(0, &[0, 1, 2]).unwrap();
        pages.write(1, &[0]).unwrap();
        pages.write(0, &[3, 4]).unwrap();
        assert_eq!((pages.taken(), &pages.of[..]), (3, &[vec![0, 2], vec![1]][..]));
        let full = pages.write(1, &[4]).unwrap_err();
        assert!(
            full.contains("the pool has 3 pages of 4 positions") && full.contains("--cache-pool"),
            "{full}"
        );
        pages.end(0);
        pages.write(1, &[4]).unwrap();
        assert_eq!(pages.of, [vec![], vec![1, 2]]);
        let (table, width) = (pages.table(5), pages.width(5));
        assert_eq!((width, &table[width..width + 3]), (64, &[1, 2, 0][..]));
    }

    #[test]
    fn what_is_shared_is_not_written_and_not_freed() {
        let mut pages = Pages::new(2, 4, 2);
        pages.write(0, &[0, 1, 2, 3, 4]).unwrap();
        assert_eq!(pages.fork(0, 1), 4);
        let again = pages.write(1, &[3]).unwrap_err();
        assert!(again.contains("position 3 of sequence 1"), "{again}");
        pages.write(1, &[4]).unwrap();
        assert_eq!(pages.of, [vec![0, 1, 2], vec![0, 1, 3]]);
        pages.end(0);
        assert_eq!(pages.free, [2]);
        pages.write(1, &[5, 0]).unwrap();
    }
}
