//! Documents, cut into sequences; which of them come when.
//!
//! Documents are packed: they stand one behind the other, and each sequence goes on where the last one ended. The first token of a
//! document is never a target, since nothing before it speaks of it. A pair of prompt and completion is a sequence of its own,
//! and only the completion is learned.

use latentc_ir::tensor::SplitMix;

use crate::gradient::Rows;

/// Sequences of tokens.
#[derive(Clone, Debug, Default)]
pub struct Data {
    /// The most inputs of a sequence.
    context: usize,
    tokens: Vec<i32>,
    /// For each token, whether it is a target.
    learned: Vec<bool>,
    /// Where sequences begin, and how many inputs they have; the targets are one further.
    sequences: Vec<(usize, usize)>,
    /// Where documents begin that are not cut yet.
    packed: usize,
    /// The part of sequences of which no token is dropped, and what decides which.
    exempt: (f64, u64),
}

impl Data {
    /// No sequences yet, later ones of up to so many inputs.
    pub fn new(context: usize) -> Data {
        Data { context: context.max(1), ..Data::default() }
    }

    /// Lets no token of this part of the sequences be dropped: each is chosen by the seed and its number alone.
    pub fn exempt(self, part: f64, seed: u64) -> Data {
        Data { exempt: (part, seed), ..self }
    }

    /// Whether no token of a sequence may be dropped.
    fn is_exempt(&self, sequence: usize) -> bool {
        let (part, seed) = self.exempt;
        // 53 random bits, as a number below 1.
        let random = SplitMix(SplitMix::mix(seed ^ 0x64726f70)).nth(sequence as u64) >> 11;
        (random as f64) * 2f64.powi(-53) < part
    }

    /// Appends a document.
    pub fn document(&mut self, ids: impl IntoIterator<Item = i32>) {
        let start = self.tokens.len();
        self.tokens.extend(ids);
        self.learned.resize(self.tokens.len(), true);
        if let Some(first) = self.learned.get_mut(start) {
            *first = false;
        }
    }

    /// Appends a prompt and its completion. What is longer than a sequence is cut off at the end; whether it was is returned.
    pub fn pair(&mut self, prompt: &[i32], completion: &[i32]) -> bool {
        self.cut();
        let start = self.tokens.len();
        self.tokens.extend(prompt.iter().chain(completion).take(self.context + 1));
        let end = self.tokens.len();
        self.learned.extend((0..end - start).map(|n| n > 0 && n >= prompt.len()));
        self.sequence(start, (end - start).saturating_sub(1));
        self.packed = end;
        prompt.len() + completion.len() > self.context + 1
    }

    /// Cuts the documents that are not yet sequences.
    pub fn cut(&mut self) {
        while self.packed + 1 < self.tokens.len() {
            let len = self.context.min(self.tokens.len() - 1 - self.packed);
            self.sequence(self.packed, len);
            self.packed += len;
        }
        self.packed = self.tokens.len();
    }

    /// Adds a sequence, if it has something to learn.
    fn sequence(&mut self, start: usize, inputs: usize) {
        if self.learned[start..start + inputs + 1].iter().skip(1).any(|&learned| learned) {
            self.sequences.push((start, inputs));
        }
    }

    /// The number of tokens.
    pub fn tokens(&self) -> usize {
        self.tokens.len()
    }

    /// The number of sequences.
    pub fn len(&self) -> usize {
        self.sequences.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.sequences.is_empty()
    }

    /// The targets of a sequence.
    pub fn targets(&self, sequence: usize) -> usize {
        let (start, len) = self.sequences[sequence];
        self.learned[start + 1..start + len + 1].iter().filter(|&&learned| learned).count()
    }

    /// A number that other data would hardly have.
    pub fn fingerprint(&self) -> u64 {
        let mut hash = SplitMix::mix(self.context as u64);
        let mut add = |n: u64| hash = SplitMix::mix(hash ^ n).wrapping_add(n);
        self.tokens.iter().zip(&self.learned).for_each(|(&t, &l)| add((t as u64) << 1 | u64::from(l)));
        self.sequences.iter().for_each(|&(start, len)| add((start as u64) << 20 ^ len as u64));
        hash
    }

    /// These sequences as a batch, padded to the longest of them.
    pub fn rows(&self, sequences: &[usize]) -> Rows {
        let of = |&n: &usize| self.sequences[n];
        let bound = sequences.iter().map(|&n| f32::from(u8::from(!self.is_exempt(n)))).collect();
        let columns = sequences.iter().map(|n| of(n).1).max().unwrap_or(0);
        let shape = [sequences.len(), columns];
        let mut rows = Rows { ids: vec![], targets: vec![], weights: vec![], here: vec![], bound, shape };
        for (n, (start, len)) in sequences.iter().map(of).enumerate() {
            rows.ids.extend(&self.tokens[start..start + len]);
            rows.targets.extend(&self.tokens[start + 1..start + len + 1]);
            let learned = &self.learned[start + 1..start + len + 1];
            rows.weights.extend(learned.iter().map(|&learned| f32::from(u8::from(learned))));
            rows.here.resize(rows.ids.len(), 1.0);
            let end = (n + 1) * columns;
            rows.ids.resize(end, 0);
            rows.targets.resize(end, 0);
            rows.weights.resize(end, 0.0);
            rows.here.resize(end, 0.0);
        }
        rows
    }
}

/// An order of sequences that goes through all of them, and again in another order. What stands at a position follows from the seed
/// and the position alone.
#[derive(Clone, Debug)]
pub struct Order {
    sequences: Vec<usize>,
    seed: u64,
    /// The order of this time through.
    epoch: Option<(u64, Vec<usize>)>,
}

impl Order {
    /// Of these sequences.
    pub fn new(sequences: Vec<usize>, seed: u64) -> Order {
        Order { sequences, seed, epoch: None }
    }

    /// Splits so many sequences of all off, chosen by the seed: the rest, and those.
    pub fn split(all: usize, off: usize, seed: u64) -> (Vec<usize>, Vec<usize>) {
        let mut rest = shuffled((0..all).collect(), SplitMix::mix(!seed));
        let mut split = rest.split_off(all - off.min(all));
        // In the order of the data: what is read together lies together.
        rest.sort_unstable();
        split.sort_unstable();
        (rest, split)
    }

    /// The sequence at a position, `None` if there are no sequences.
    pub fn at(&mut self, position: u64) -> Option<usize> {
        let count = self.sequences.len() as u64;
        let epoch = position.checked_div(count)?;
        if self.epoch.as_ref().is_none_or(|(is, _)| *is != epoch) {
            let seed = SplitMix(SplitMix::mix(self.seed)).nth(epoch);
            self.epoch = Some((epoch, shuffled(self.sequences.clone(), seed)));
        }
        self.epoch.as_ref().map(|(_, order)| order[(position % count) as usize])
    }
}

/// Fisher and Yates, by Durstenfeld.
fn shuffled(mut items: Vec<usize>, seed: u64) -> Vec<usize> {
    let random = SplitMix(seed);
    for n in (1..items.len()).rev() {
        // Of 64 bits, the fraction: as even as anyone can tell.
        let k = (u128::from(random.nth(n as u64)) * (n as u128 + 1)) >> 64;
        items.swap(n, k as usize);
    }
    items
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_are_packed_and_their_first_tokens_are_no_targets() {
        let mut data = Data::new(4);
        data.document([1, 2, 3]);
        data.document([]);
        data.document([4, 5, 6, 7]);
        data.cut();
        // Inputs 1 2 3 4, then 5 6: every target stands once.
        assert_eq!(data.len(), 2);
        let rows = data.rows(&[0, 1]);
        assert_eq!(rows.shape, [2, 4]);
        assert_eq!(rows.ids, [1, 2, 3, 4, 5, 6, 0, 0]);
        assert_eq!(rows.targets, [2, 3, 4, 5, 6, 7, 0, 0]);
        assert_eq!(rows.weights, [1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0]);
        assert_eq!(rows.here, [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0]);
        assert_eq!(rows.sequences(), 2);
        assert_eq!([data.targets(0), data.targets(1)], [3, 2]);
    }

    #[test]
    fn a_tenth_of_the_sequences_is_exempt_and_always_the_same() {
        let mut data = Data::new(1);
        data.document(0..2001);
        data.cut();
        let data = data.exempt(0.1, 7);
        let all: Vec<usize> = (0..2000).collect();
        let bound = data.rows(&all).bound;
        let exempt = bound.iter().filter(|&&x| x == 0.0).count();
        assert!((150..250).contains(&exempt), "{exempt} of 2000");
        assert_eq!(data.rows(&[1234, 5]).bound, [bound[1234], bound[5]]);
        assert!(data.clone().exempt(0.1, 8).rows(&all).bound != bound, "another seed, others");
        assert!(data.exempt(0.0, 7).rows(&all).bound.iter().all(|&x| x == 1.0));
    }

    #[test]
    fn prompts_are_not_learned() {
        let mut data = Data::new(4);
        data.document([9, 8]);
        assert!(!data.pair(&[1, 2], &[3, 4]));
        assert!(data.pair(&[1, 2, 3], &[4, 5, 6]), "five tokens fit");
        assert!(data.pair(&[1, 2, 3, 4, 5], &[6]), "and a prompt alone teaches nothing");
        data.pair(&[], &[7, 6]);
        data.cut();
        assert_eq!(data.len(), 4);
        let rows = data.rows(&[0, 1, 2, 3]);
        assert_eq!(rows.shape, [4, 4]);
        assert_eq!(rows.ids, [9, 0, 0, 0, 1, 2, 3, 0, 1, 2, 3, 4, 7, 0, 0, 0]);
        let o = 0.0;
        assert_eq!(rows.weights, [1.0, o, o, o, o, 1.0, 1.0, o, o, o, 1.0, 1.0, 1.0, o, o, o]);
    }

    #[test]
    fn an_order_goes_through_all_and_follows_from_the_position() {
        let mut order = Order::new((10..17).collect(), 3);
        let all: Vec<_> = (0..21).map(|n| order.at(n).expect("there are some")).collect();
        for epoch in all.chunks(7) {
            let mut sorted = epoch.to_vec();
            sorted.sort_unstable();
            assert_eq!(sorted, (10..17).collect::<Vec<_>>());
        }
        assert_ne!(all[..7], all[7..14]);
        for n in [20, 0, 13, 7] {
            assert_eq!(order.at(n), Some(all[n as usize]));
        }
        let mut other = Order::new((10..17).collect(), 4);
        assert_ne!(
            (0..7).map(|n| other.at(n)).collect::<Vec<_>>(),
            all[..7].iter().map(|&n| Some(n)).collect::<Vec<_>>()
        );
        assert_eq!(Order::new(Vec::new(), 1).at(0), None);
    }

    #[test]
    fn a_split_leaves_nothing_out() {
        let (rest, off) = Order::split(20, 3, 1);
        let mut all = [rest, off.clone()].concat();
        all.sort_unstable();
        assert_eq!((off.len(), all), (3, (0..20).collect()));
        assert!(Order::split(2, 9, 1).0.is_empty());
    }
}
