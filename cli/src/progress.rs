//! Progress on standard error, for people only: nothing is drawn where it is not a terminal.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// A progress display that is removed when it is dropped, also by an error.
pub(crate) struct Shown(ProgressBar);

impl Shown {
    /// What is being done now.
    pub(crate) fn say(&self, what: String) {
        self.0.set_message(what);
    }

    /// So much more is done.
    pub(crate) fn advance(&self, by: u64) {
        self.0.inc(by);
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

/// For work of unknown length.
pub(crate) fn spinner(what: &'static str) -> Shown {
    let bar = ProgressBar::new_spinner().with_message(what);
    bar.enable_steady_tick(Duration::from_millis(100));
    Shown(bar)
}

/// For so many bytes.
pub(crate) fn bytes(what: &'static str, total: u64) -> Shown {
    let bar = ProgressBar::new(total).with_message(what);
    if let Ok(style) = ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes}, {eta}") {
        bar.set_style(style);
    }
    Shown(bar)
}

/// For steps of a training, some of which were made before.
pub(crate) fn steps(made: u64, total: u64) -> Shown {
    let bar = ProgressBar::new(total);
    if let Ok(style) = ProgressStyle::with_template("{pos}/{len} {wide_bar} {msg}, {eta} left") {
        bar.set_style(style);
    }
    bar.set_position(made);
    bar.reset_eta();
    Shown(bar)
}

/// Whether anything is drawn at all.
pub(crate) fn is_drawn() -> bool {
    std::io::stderr().is_terminal()
}
