//! How far a long piece of work is: a bar on a terminal, a line every tenth elsewhere.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// The progress of one piece of work after another, on standard error.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    bar: Option<ProgressBar>,
    what: String,
    tenths_told: u64,
}

impl Progress {
    /// `done` of `total` of `what`; when `what` changes, something else has begun.
    pub(crate) fn set(&mut self, what: &str, done: u64, total: u64) {
        if what != self.what {
            self.clear();
            self.what = what.to_owned();
        }
        let total = total.max(1);
        let done = done.min(total);
        if std::io::stderr().is_terminal() {
            let bar = self.bar.get_or_insert_with(|| bar(what));
            bar.set_length(total);
            bar.set_position(done);
        } else {
            let tenths = done * 10 / total;
            if tenths > self.tenths_told {
                self.tenths_told = tenths;
                let _ = writeln!(std::io::stderr(), "{what}: {} %", tenths * 10);
            }
        }
    }

    /// A word on how it goes, for a terminal.
    pub(crate) fn note(&self, note: &str) {
        if let Some(bar) = &self.bar {
            let separator = if note.is_empty() { "" } else { ", " };
            bar.set_message(format!("{}{separator}{note}", self.what));
        }
    }

    /// The work is over, or another begins.
    pub(crate) fn clear(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
        self.what.clear();
        self.tenths_told = 0;
    }

    /// Prints without tearing the bar.
    pub(crate) fn suspend(&self, print: impl FnOnce()) {
        match &self.bar {
            Some(bar) => bar.suspend(print),
            None => print(),
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.clear();
    }
}

fn bar(what: &str) -> ProgressBar {
    let bar = ProgressBar::new(1);
    let style = ProgressStyle::with_template("{msg} {wide_bar} {percent:>3} % {eta}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_message(what.to_owned());
    bar.enable_steady_tick(Duration::from_millis(250));
    bar
}
