//! What a command prints: text for people, JSON for programs.

use std::io::{self, Write};

use serde::Serialize;

use crate::failure::Failure;

/// Where results go. Logs and progress go to standard error instead.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Output {
    json: bool,
}

impl Output {
    pub(crate) fn new(json: bool) -> Self {
        Self { json }
    }

    pub(crate) fn is_json(self) -> bool {
        self.json
    }

    /// The one result of a command.
    pub(crate) fn document(self, value: &impl Serialize, text: impl FnOnce() -> String) {
        if self.json {
            print(&serde_json::to_string_pretty(value).expect("plain values serialise"));
        } else {
            print(&text());
        }
    }

    /// One of many happenings; `text` may find it not worth a line.
    pub(crate) fn event(self, value: &impl Serialize, text: impl FnOnce() -> Option<String>) {
        if self.json {
            print(&serde_json::to_string(value).expect("plain values serialise"));
        } else if let Some(text) = text() {
            print(&text);
        }
    }

    pub(crate) fn failure(self, failure: &Failure) {
        if self.json {
            let mut document = failure.document.as_deref().cloned().unwrap_or_default();
            document.insert("error".to_owned(), serde_json::json!(failure));
            print(&serde_json::Value::Object(document).to_string());
        } else {
            let Failure { code, reason, remedy, .. } = failure;
            let _ = writeln!(io::stderr(), "error [{code}]: {reason}\n  what to do: {remedy}");
        }
    }
}

/// A reader that has gone away (`| head`) is no reason to panic.
fn print(text: &str) {
    let mut stdout = io::stdout().lock();
    let _ = writeln!(stdout, "{}", text.trim_end_matches('\n')).and_then(|()| stdout.flush());
}

/// Columns of words, each as wide as its widest.
pub(crate) fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns)
        .map(|column| {
            let cells = rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        })
        .collect();
    let lines = rows.iter().map(|row| {
        let cells = row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:<width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    });
    lines.collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::table;

    #[test]
    fn columns_line_up() {
        let rows = [vec!["a".to_owned(), "b".to_owned()], vec!["long".to_owned(), "c".to_owned()]];
        assert_eq!(table(&rows), "a     b\nlong  c");
    }
}
