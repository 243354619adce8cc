use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use manyhands_model::data::{
    Dataset, DocumentError, Manifest, ManifestError, PrepareError, PrepareOptions, PrepareProgress,
    SequenceError, SequenceId, SequenceSource, ShardError, ShardSet, SourceSet, Split,
    TextTokenizer, TokenizerChoice, prepare,
};
use manyhands_proto::Digest;
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use tempfile::TempDir;

const CONTEXT: u32 = 16;

fn sentence(number: usize) -> String {
    format!("fn number_{number}() -> usize {{ {} * {number} }} // the naïve way\n", number % 7)
}

/// A tree of text, a JSONL and a Parquet file, and files to be left out.
fn corpus(folder: &Path) {
    fs::create_dir_all(folder.join("tree/inner")).expect("a folder");
    for number in 0..120 {
        let place = if number % 2 == 0 { "tree" } else { "tree/inner" };
        let text: String = (0..20).map(|line| sentence(number * 20 + line)).collect();
        fs::write(folder.join(place).join(format!("{number:03}.rs")), text).expect("a file");
    }
    fs::write(folder.join("tree/notes.md"), "left out: another extension").expect("a file");
    fs::write(folder.join("tree/broken.rs"), [0xff, 0xfe, 0x00]).expect("a file");
    fs::write(folder.join("tree/empty.rs"), "").expect("a file");

    let lines: String = (0..80)
        .map(|number| {
            serde_json::json!({"id": number, "text": sentence(9_000 + number)}).to_string() + "\n"
        })
        .collect();
    fs::write(folder.join("more.jsonl"), lines).expect("a file");
    parquet_file(
        &folder.join("most.parquet"),
        &(0..80).map(|n| sentence(20_000 + n)).collect::<Vec<_>>(),
    );
}

fn parquet_file(path: &Path, texts: &[String]) {
    let schema = parse_message_type(
        "message docs { required binary other (UTF8); required binary text (UTF8); }",
    );
    let file = fs::File::create(path).expect("a file");
    let properties = Arc::new(WriterProperties::default());
    let mut writer =
        SerializedFileWriter::new(file, Arc::new(schema.expect("a schema")), properties)
            .expect("opens");
    let mut group = writer.next_row_group().expect("a row group");
    for column in 0..2 {
        let mut chunk = group.next_column().expect("works").expect("a column");
        let values: Vec<ByteArray> = texts
            .iter()
            .map(|text| ByteArray::from(if column == 1 { text.as_str() } else { "x" }))
            .collect();
        chunk.typed::<ByteArrayType>().write_batch(&values, None, None).expect("writes");
        chunk.close().expect("closes");
    }
    group.close().expect("closes");
    writer.close().expect("closes");
}

fn options(corpus: &Path, folder: PathBuf) -> PrepareOptions {
    let paths = [corpus.join("tree"), corpus.join("more.jsonl"), corpus.join("most.parquet")];
    options_for(SourceSet::find(&paths, &["rs".to_owned()], "text").expect("files"), folder)
}

fn options_for(sources: SourceSet, folder: PathBuf) -> PrepareOptions {
    PrepareOptions {
        sources,
        tokenizer: TokenizerChoice::Train { vocabulary_size: 400, sample_bytes_max: 1 << 20 },
        folder,
        held_out_per_mille: 100,
        shard_tokens: 4_096,
        text_bytes_max: None,
    }
}

fn prepared(home: &TempDir, name: &str) -> Dataset {
    prepare(&options(home.path(), home.path().join(name)), &mut |_| {}).expect("prepares").dataset
}

fn home() -> TempDir {
    let home = TempDir::new().expect("a folder");
    corpus(home.path());
    home
}

fn shards(dataset: &Dataset, split: Split) -> ShardSet {
    let folder = dataset.folder().to_owned();
    ShardSet::new(dataset.manifest().clone(), split, CONTEXT, move |digest| {
        Dataset::shard_path_in(&folder, digest)
    })
}

#[test]
fn the_same_text_gives_the_same_dataset_and_the_text_comes_back() {
    let home = home();
    let mut stages = BTreeSet::new();
    let options = options(home.path(), home.path().join("one"));
    let first = prepare(&options, &mut |progress| {
        stages.insert(match progress {
            PrepareProgress::Sampling { .. } => 0,
            PrepareProgress::TrainingTokenizer => 1,
            PrepareProgress::Tokenizing { .. } => 2,
        });
    })
    .expect("prepares");
    assert_eq!(stages.len(), 3, "every stage is told");
    assert_eq!(first.files_not_utf8, 1);
    let dataset = first.dataset;
    let manifest = dataset.manifest();
    assert_eq!(manifest.digest(), prepared(&home, "two").manifest().digest());
    assert_eq!(manifest.documents(), 120 + 80 + 80, "empty and unwanted files are no documents");

    let tokenizer = TextTokenizer::open(&dataset.tokenizer_path()).expect("a tokenizer");
    assert_eq!(tokenizer.digest(), manifest.tokenizer().digest);
    let mut text = String::new();
    for shard in manifest.shards() {
        let bytes = fs::read(dataset.shard_path(&shard.digest)).expect("a shard");
        assert_eq!(bytes.len() as u64, manifest.shard_bytes(shard));
        assert_eq!(Digest::of(&bytes), shard.digest);
        let tokens: Vec<u32> = bytes[16..]
            .chunks(2)
            .map(|pair| u32::from(u16::from_le_bytes([pair[0], pair[1]])))
            .collect();
        text += &tokenizer.decode(&tokens).expect("decodes");
    }
    assert!((0..2_400).all(|number| text.contains(&sentence(number))), "a text is missing");
    assert!(text.contains(&sentence(9_079)) && text.contains(&sentence(20_079)));
    assert!(!text.contains("left out"));
    let held_out = manifest.tokens(Split::HeldOut) as f64 / manifest.tokens(Split::Train) as f64;
    assert!((0.02..0.25).contains(&held_out), "{held_out}");
    let unigram = manifest.unigram_loss();
    assert!((2.0..6.0).contains(&unigram), "{unigram}");
}

#[test]
fn sequences_cover_the_shards_and_know_where_they_lie() {
    let home = home();
    let dataset = prepared(&home, "data");
    let manifest = dataset.manifest();
    let train = shards(&dataset, Split::Train);
    let count = manifest.sequence_count(Split::Train, CONTEXT);
    assert_eq!(train.sequence_count(), count);
    let trained: Vec<_> =
        manifest.shards().iter().filter(|shard| shard.split == Split::Train).collect();
    assert!(trained.len() >= 3, "the corpus has more than one shard");
    assert_eq!(
        count,
        trained.iter().map(|shard| (shard.tokens - 1) / u64::from(CONTEXT)).sum::<u64>()
    );

    let first = train.sequence(SequenceId(0)).expect("the first");
    let second = train.sequence(SequenceId(1)).expect("the second");
    assert_eq!(first.len(), CONTEXT as usize + 1);
    assert_eq!(first.last(), second.first(), "the last target is the next first input");
    train.sequence(SequenceId(count - 1)).expect("the last");
    assert!(matches!(train.sequence(SequenceId(count)), Err(SequenceError::OutOfRange { .. })));

    let in_first_shard = (trained[0].tokens - 1) / u64::from(CONTEXT);
    assert_eq!(
        train.shards_for(&[SequenceId(0), SequenceId(in_first_shard - 1)]),
        [trained[0].digest].into()
    );
    assert_eq!(
        train.shards_for(&[SequenceId(0), SequenceId(in_first_shard)]),
        [trained[0].digest, trained[1].digest].into()
    );
    assert!(shards(&dataset, Split::HeldOut).sequence_count() > 0);
}

#[test]
fn a_damaged_or_missing_shard_is_named() {
    let home = home();
    let dataset = prepared(&home, "data");
    let shard = &dataset.manifest().shards()[0];
    let path = dataset.shard_path(&shard.digest);
    let good = fs::read(&path).expect("a shard");

    let mut bad = good.clone();
    bad[40] ^= 1;
    fs::write(&path, &bad).expect("writes");
    let refused = shards(&dataset, Split::Train).sequence(SequenceId(0));
    assert!(
        matches!(refused, Err(SequenceError::Shard(ShardError::Digest { expected, .. })) if expected == shard.digest)
    );

    fs::write(&path, &good[..good.len() - 2]).expect("writes");
    let refused = shards(&dataset, Split::Train).sequence(SequenceId(0));
    assert!(matches!(refused, Err(SequenceError::Shard(ShardError::Header { .. }))));

    fs::remove_file(&path).expect("removes");
    let refused = shards(&dataset, Split::Train).sequence(SequenceId(0));
    assert!(matches!(refused, Err(SequenceError::Shard(ShardError::Read { .. }))));
}

#[test]
fn preparing_starts_again_after_a_kill_and_never_overwrites() {
    let home = home();
    let partial = home.path().join("data.partial");
    fs::create_dir_all(partial.join("shards")).expect("a folder");
    fs::write(partial.join("shards/left-over"), "from a killed run").expect("a file");
    let dataset = prepared(&home, "data");
    assert!(!partial.exists() && !dataset.folder().join("shards/left-over").exists());
    let again = prepare(&options(home.path(), home.path().join("data")), &mut |_| {});
    assert!(matches!(again, Err(PrepareError::FolderExists(_))));
    Dataset::open_expecting(dataset.folder(), dataset.manifest().digest()).expect("untouched");
    assert!(matches!(
        Dataset::open_expecting(dataset.folder(), Digest::of(b"another")),
        Err(ManifestError::Digest { .. })
    ));
}

#[test]
fn a_tokenizer_can_be_given_and_text_can_be_limited() {
    let home = home();
    let whole = prepared(&home, "whole");
    let all = options(home.path(), home.path().join("part"));
    let part = PrepareOptions {
        tokenizer: TokenizerChoice::Load(whole.tokenizer_path()),
        text_bytes_max: Some(all.sources.bytes() / 2),
        ..all
    };
    let part = prepare(&part, &mut |_| {}).expect("prepares").dataset;
    assert_eq!(part.manifest().tokenizer(), whole.manifest().tokenizer());
    let share = part.manifest().documents() as f64 / whole.manifest().documents() as f64;
    assert!((0.35..0.65).contains(&share), "{share}");
}

#[test]
fn one_huge_file_is_cut_into_documents_of_which_some_are_held_out() {
    let home = TempDir::new().expect("a folder");
    let text: String = (0..150_000).map(sentence).collect();
    let file = home.path().join("all.txt");
    fs::write(&file, &text).expect("a file");
    let sources = SourceSet::find(&[file], &[], "text").expect("a file");
    let options = PrepareOptions {
        held_out_per_mille: 300,
        ..options_for(sources, home.path().join("data"))
    };
    let prepared = prepare(&options, &mut |_| {}).expect("prepares");
    assert_eq!(prepared.text_bytes, text.len() as u64, "no byte is lost at a cut");
    assert!(prepared.dataset.manifest().documents() >= 8);
    assert!(prepared.dataset.manifest().tokens(Split::HeldOut) > 0);
}

#[test]
fn bad_sources_are_named_with_their_line() {
    let home = TempDir::new().expect("a folder");
    let run = |name: &str, text: &str| {
        let file = home.path().join(name);
        fs::write(&file, text).expect("a file");
        let sources = SourceSet::find(&[file], &[], "text").expect("a file");
        let options = options_for(sources, home.path().join("data"));
        prepare(&options, &mut |_| {}).expect_err("refused").to_string()
    };
    assert!(run("bad.jsonl", "{\"text\":\"a\"}\nnot json\n").contains("bad.jsonl line 2"));
    assert!(
        run("field.jsonl", "{\"content\":\"a\"}\n")
            .contains("expected a text in the field \"text\"")
    );
    assert!(run("bad.parquet", "no parquet").contains("bad.parquet"));
    assert!(run("short.txt", "x").contains("give more text"));
    let none = SourceSet::find(&[home.path().to_owned()], &["nothing".to_owned()], "text");
    assert!(matches!(none, Err(DocumentError::NoFiles)));
}

#[test]
fn a_manifest_from_elsewhere_is_checked() {
    let home = home();
    let bytes = prepared(&home, "data").manifest().to_bytes();
    let text = String::from_utf8(bytes.clone()).expect("JSON");
    assert_eq!(Manifest::parse(&bytes).expect("our own").to_bytes(), bytes);
    let refused = |text: String| Manifest::parse(text.as_bytes()).expect_err("refused");
    assert!(matches!(refused(text.clone() + " "), ManifestError::NotCanonical));
    assert!(matches!(
        refused(text.replace("\"format\":1", "\"format\":2")),
        ManifestError::Format { got: 2 }
    ));
    assert!(matches!(
        refused(text.replace("\"end_of_text\":0", "\"end_of_text\":400")),
        ManifestError::Vocabulary { .. }
    ));
    assert!(matches!(
        refused(text.replace("\"tokens\":4096", "\"tokens\":1")),
        ManifestError::ShardTokens { .. }
    ));
    assert!(matches!(refused(text.replace("\"format\"", "\"formad\"")), ManifestError::Json(_)));
    assert!(matches!(refused(String::new()), ManifestError::Json(_)));
}

#[test]
fn training_a_tokenizer_does_not_depend_on_the_order_of_texts() {
    let texts: Vec<String> = (0..500).map(sentence).collect();
    let forward = TextTokenizer::train(350, texts.iter().cloned()).expect("trains");
    let backward = TextTokenizer::train(350, texts.iter().rev().cloned()).expect("trains");
    assert_eq!(forward.bytes(), backward.bytes());
    assert_eq!(forward.vocabulary_size(), 350);
    let tokens = forward.encode("naïve <|endoftext|> 🙂").expect("encodes");
    assert!(!tokens.contains(&forward.end_of_text()), "text cannot end a document");
    assert_eq!(forward.decode(&tokens).expect("decodes"), "naïve <|endoftext|> 🙂");
}
