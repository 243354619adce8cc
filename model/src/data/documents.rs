//! Reads documents one by one from text trees, JSONL and Parquet, in bounded memory and in a defined order.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::RowAccessor;
use parquet::record::reader::RowIter;
use walkdir::WalkDir;

/// Longest document in bytes. Longer texts are cut into documents of this size at most, at the end of
/// a line where there is one: a corpus that is one huge file still has a held-out part.
const DOCUMENT_BYTES_MAX: usize = 1 << 20;

/// Longest line of a JSONL file in bytes.
const LINE_BYTES_MAX: u64 = 64 << 20;

/// Why documents could not be read.
#[derive(Debug, thiserror::Error)]
pub enum DocumentError {
    #[error("cannot read {path}: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("cannot walk a folder: {0}")]
    Walk(#[from] walkdir::Error),
    #[error("expected at least one file with text under the given paths, got none")]
    NoFiles,
    #[error("{path} line {line}: {problem}")]
    Line { path: PathBuf, line: u64, problem: String },
    #[error("{path}: {problem}")]
    Parquet { path: PathBuf, problem: String },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Text,
    Jsonl,
    Parquet,
}

#[derive(Debug, Clone)]
struct SourceFile {
    path: PathBuf,
    format: Format,
    bytes: u64,
}

/// A list of files, in a defined order, that can be read through more than once.
#[derive(Debug, Clone)]
pub struct SourceSet {
    files: Vec<SourceFile>,
    text_field: String,
}

impl SourceSet {
    /// Finds the files of `paths`. A folder is walked in the order of names, without following links;
    /// of its files those count whose extension is in `extensions` (without dot; empty: all).
    /// `.jsonl` and `.ndjson` hold one object a line, `.parquet` rows; `text_field` names the field or
    /// column with the text. Everything else is plain text.
    ///
    /// # Errors
    /// When a path cannot be read, or there is no file.
    pub fn find(
        paths: &[PathBuf],
        extensions: &[String],
        text_field: &str,
    ) -> Result<Self, DocumentError> {
        let mut files = Vec::new();
        for root in paths {
            let metadata = std::fs::metadata(root)
                .map_err(|source| DocumentError::Read { path: root.clone(), source })?;
            if metadata.is_file() {
                files.push(SourceFile {
                    path: root.clone(),
                    format: format_of(root),
                    bytes: metadata.len(),
                });
                continue;
            }
            for entry in WalkDir::new(root).sort_by_file_name() {
                let entry = entry?;
                let extension = entry
                    .path()
                    .extension()
                    .and_then(|extension| extension.to_str())
                    .unwrap_or_default();
                let wanted =
                    extensions.is_empty() || extensions.iter().any(|wanted| wanted == extension);
                if entry.file_type().is_file() && wanted {
                    files.push(SourceFile {
                        format: format_of(entry.path()),
                        bytes: entry.metadata()?.len(),
                        path: entry.into_path(),
                    });
                }
            }
        }
        if files.is_empty() {
            return Err(DocumentError::NoFiles);
        }
        Ok(Self { files, text_field: text_field.to_owned() })
    }

    /// Sizes of all files together, in bytes.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes).sum()
    }

    /// Reads through all documents, in the same order each time.
    pub(super) fn documents(&self) -> Documents {
        Documents {
            files: self.files.clone().into(),
            text_field: self.text_field.clone(),
            current: None,
            not_utf8: 0,
        }
    }
}

fn format_of(path: &Path) -> Format {
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("jsonl" | "ndjson") => Format::Jsonl,
        Some("parquet") => Format::Parquet,
        Some(_) | None => Format::Text,
    }
}

/// All documents of a [`SourceSet`]; none is empty or longer than [`DOCUMENT_BYTES_MAX`].
pub(super) struct Documents {
    files: VecDeque<SourceFile>,
    text_field: String,
    current: Option<Reader>,
    not_utf8: u64,
}

enum Reader {
    Text(TextPieces),
    Jsonl { lines: Lines, pieces: VecDeque<String> },
    Parquet { path: PathBuf, rows: RowIter<'static>, column: usize, pieces: VecDeque<String> },
}

impl Documents {
    /// Text files left out, from the first piece that is not UTF-8.
    pub(super) fn not_utf8(&self) -> u64 {
        self.not_utf8
    }

    fn open(&self, file: &SourceFile) -> Result<Reader, DocumentError> {
        let path = file.path.clone();
        let opened = File::open(&path)
            .map_err(|source| DocumentError::Read { path: path.clone(), source })?;
        match file.format {
            Format::Text => {
                Ok(Reader::Text(TextPieces { path, file: opened, carry: Vec::new(), ended: false }))
            }
            Format::Jsonl => Ok(Reader::Jsonl {
                lines: Lines { path, reader: BufReader::new(opened), line: 0 },
                pieces: VecDeque::new(),
            }),
            Format::Parquet => {
                let failed =
                    |problem: String| DocumentError::Parquet { path: path.clone(), problem };
                let reader =
                    SerializedFileReader::new(opened).map_err(|error| failed(error.to_string()))?;
                let schema = reader.metadata().file_metadata().schema();
                let column = schema
                    .get_fields()
                    .iter()
                    .position(|field| field.name() == self.text_field)
                    .ok_or_else(|| {
                        failed(format!("expected a column {:?}, got none", self.text_field))
                    })?;
                let projection = parquet::schema::types::Type::group_type_builder(schema.name())
                    .with_fields(vec![schema.get_fields()[column].clone()])
                    .build()
                    .map_err(|error| failed(error.to_string()))?;
                let rows = RowIter::from_file_into(Box::new(reader))
                    .project(Some(projection))
                    .map_err(|error| failed(error.to_string()))?;
                Ok(Reader::Parquet { path, rows, column: 0, pieces: VecDeque::new() })
            }
        }
    }

    fn next_document(&mut self) -> Result<Option<String>, DocumentError> {
        loop {
            let Some(reader) = &mut self.current else {
                let Some(file) = self.files.pop_front() else { return Ok(None) };
                self.current = Some(self.open(&file)?);
                continue;
            };
            let piece = match reader {
                Reader::Text(pieces) => match pieces.next_piece()? {
                    Piece::Text(text) => Some(text),
                    Piece::NotUtf8 => {
                        self.not_utf8 += 1;
                        None
                    }
                    Piece::End => None,
                },
                Reader::Jsonl { lines, pieces } => {
                    next_of_record(pieces, || lines.next_text(&self.text_field))?
                }
                Reader::Parquet { path, rows, column, pieces } => next_of_record(pieces, || {
                    let failed =
                        |problem: String| DocumentError::Parquet { path: path.clone(), problem };
                    let Some(row) = rows.next() else { return Ok(None) };
                    let row = row.map_err(|error| failed(error.to_string()))?;
                    let text =
                        row.get_string(*column).map_err(|error| failed(error.to_string()))?;
                    Ok(Some(text.clone()))
                })?,
            };
            match piece {
                Some(text) if text.is_empty() => {}
                Some(text) => return Ok(Some(text)),
                None => self.current = None,
            }
        }
    }
}

impl Iterator for Documents {
    type Item = Result<String, DocumentError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.next_document().transpose()
    }
}

/// The next piece of a record, reading a record when there is none left.
fn next_of_record(
    pieces: &mut VecDeque<String>,
    read: impl FnOnce() -> Result<Option<String>, DocumentError>,
) -> Result<Option<String>, DocumentError> {
    if pieces.is_empty() {
        let Some(mut text) = read()? else { return Ok(None) };
        while text.len() > DOCUMENT_BYTES_MAX {
            let rest = text.split_off(cut(&text.as_bytes()[..DOCUMENT_BYTES_MAX]));
            pieces.push_back(std::mem::replace(&mut text, rest));
        }
        pieces.push_back(text);
    }
    Ok(pieces.pop_front())
}

/// Where to cut a full piece: after the last line end of its second half, or else between characters.
fn cut(bytes: &[u8]) -> usize {
    let half = bytes.len() / 2;
    match bytes[half..].iter().rposition(|&byte| byte == b'\n') {
        Some(at) => half + at + 1,
        // A byte of the form 10…… continues a character; the lead byte before it belongs to the rest.
        None => bytes.iter().rposition(|byte| byte & 0xc0 != 0x80).unwrap_or(bytes.len()),
    }
}

enum Piece {
    Text(String),
    NotUtf8,
    End,
}

struct TextPieces {
    path: PathBuf,
    file: File,
    carry: Vec<u8>,
    ended: bool,
}

impl TextPieces {
    fn next_piece(&mut self) -> Result<Piece, DocumentError> {
        if self.ended {
            return Ok(Piece::End);
        }
        let wanted = (DOCUMENT_BYTES_MAX - self.carry.len()) as u64;
        let mut bytes = std::mem::take(&mut self.carry);
        Read::by_ref(&mut self.file)
            .take(wanted)
            .read_to_end(&mut bytes)
            .map_err(|source| DocumentError::Read { path: self.path.clone(), source })?;
        if bytes.len() < DOCUMENT_BYTES_MAX {
            self.ended = true;
        } else {
            self.carry = bytes.split_off(cut(&bytes));
        }
        Ok(match String::from_utf8(bytes) {
            Ok(text) => Piece::Text(text),
            Err(_) => {
                self.ended = true;
                Piece::NotUtf8
            }
        })
    }
}

struct Lines {
    path: PathBuf,
    reader: BufReader<File>,
    line: u64,
}

impl Lines {
    fn next_text(&mut self, field: &str) -> Result<Option<String>, DocumentError> {
        loop {
            let mut line = Vec::new();
            self.line += 1;
            let failed = |problem: String| DocumentError::Line {
                path: self.path.clone(),
                line: self.line,
                problem,
            };
            let read = Read::by_ref(&mut self.reader)
                .take(LINE_BYTES_MAX)
                .read_until(b'\n', &mut line)
                .map_err(|source| DocumentError::Read { path: self.path.clone(), source })?;
            if read == 0 {
                return Ok(None);
            }
            if read as u64 == LINE_BYTES_MAX && line.last() != Some(&b'\n') {
                return Err(failed(format!("expected at most {LINE_BYTES_MAX} bytes, got more")));
            }
            if line.iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            let object: serde_json::Value =
                serde_json::from_slice(&line).map_err(|error| failed(error.to_string()))?;
            return match object.get(field) {
                Some(serde_json::Value::String(text)) => Ok(Some(text.clone())),
                Some(_) | None => {
                    Err(failed(format!("expected a text in the field {field:?}, got none")))
                }
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cut_falls_after_a_line_or_between_characters() {
        assert_eq!(cut(b"one\ntwo\nthr"), 8);
        assert_eq!(cut(b"one\ntwothree"), 11);
        assert_eq!(cut("abcdé".as_bytes()), 4);
        assert_eq!(cut(&"abcdé".as_bytes()[..5]), 4);
    }
}
