//! What the memory of temporaries is for.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use serde::Serialize;

use super::{Layout, Lives, PlanError, alive};
use crate::program::Program;

/// What temporaries are for at the moment when most bytes of them are alive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Account {
    /// What the entry returns.
    pub results: u64,
    /// What is made before the entry's first result and read behind it: of a gradient's program, what its backward half has of the
    /// forward half.
    pub kept: u64,
    /// All else.
    pub passing: u64,
    /// What is alive of [`kept`](Account::kept) when the first result is there, which is when all of it is.
    pub kept_at_turn: u64,
}

impl Account {
    /// Of a run at these sizes.
    ///
    /// # Errors
    /// See [`PlanError`].
    pub fn of(
        program: &Program,
        sizes: &BTreeMap<String, u64>,
        layout: &Layout,
    ) -> Result<Account, PlanError> {
        let Lives { lives, results, end, .. } = Lives::of(program, sizes, layout, false)?;
        let most = alive(&lives, end).into_iter().enumerate().max_by_key(|(t, bytes)| (*bytes, Reverse(*t)));
        let most = most.map_or(0, |(t, _)| t);
        let turn = results.first().map_or(0, |&loss| lives[loss].start);
        let mut account = Account::default();
        for (n, life) in lives.iter().enumerate() {
            let is_kept = life.start <= turn && life.end > turn && !results.contains(&n);
            if is_kept {
                account.kept_at_turn += life.bytes;
            }
            if life.present(n).contains(&most) {
                *match (results.contains(&n), is_kept) {
                    (true, _) => &mut account.results,
                    (false, true) => &mut account.kept,
                    (false, false) => &mut account.passing,
                } += life.bytes;
            }
        }
        Ok(account)
    }
}
