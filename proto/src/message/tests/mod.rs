//! Stories of the door: what goes through comes out the same, and nothing else goes through.

mod limits;

use std::net::SocketAddr;

use proptest::prelude::*;
use prost::Message as _;

use super::*;
use crate::keys::NodeKey;
use crate::run_file::Precision;
use crate::{Digest, NodeId, Round, RunId, TokenCount};

const RUN: RunId = RunId::new([9; 32]);

fn worker() -> NodeKey {
    NodeKey::from_seed([1; 32])
}

fn coordinator() -> NodeKey {
    NodeKey::from_seed([2; 32])
}

fn heading(nonce: u64) -> Heading {
    Heading { run: RUN, round: Round(4), nonce }
}

fn digest(name: &str) -> Digest {
    Digest::of(name.as_bytes())
}

/// Node ids in ascending order.
fn nodes(count: usize) -> Vec<NodeId> {
    let node = |number: usize| {
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&(number as u64).to_be_bytes());
        NodeId::new(bytes)
    };
    (0..count).map(node).collect()
}

fn addresses() -> Vec<SocketAddr> {
    ["192.0.2.7:4711", "[2001:db8::1]:9"].map(|text| text.parse().expect("an address")).to_vec()
}

fn commitment() -> Commitment {
    Commitment {
        round: Round(4),
        first_sequence: 1 << 40,
        payload: digest("payload"),
        payload_bytes: 123_456,
        theta: digest("theta"),
        moments: digest("moments"),
        error: digest("error"),
        assignment: digest("assignment"),
        tokens: TokenCount(65_536),
        loss: 4.25,
    }
}

fn assignment(start: Start) -> Assignment {
    Assignment {
        round: Round(4),
        worker: worker().node_id(),
        theta: digest("theta"),
        class: NumericClass::unknown(DeviceKind::Cpu),
        first_sequence: 1 << 40,
        sequences: 96,
        steps: 12,
        first_step: 48,
        start,
        left_out: vec![3, 40],
        commit_deadline_ms: 30_000,
    }
}

fn replay(start: Start) -> Replay {
    let head = (start != Start::Fresh).then(commitment);
    Replay {
        id: 7,
        assignment: assignment(start),
        head,
        source: Source { node: worker().node_id(), addresses: addresses() },
    }
}

const HEAD: Start = Start::Head {
    round: Round(2),
    commitment: Digest::new([7; 32]),
    sent_values_returned: true,
    adam_step: 24,
};

fn class() -> NumericClass {
    NumericClass {
        libtorch: "2.9".to_owned(),
        device: DeviceKind::Cuda,
        device_name: "grün".to_owned(),
        kernels: "none".to_owned(),
        precision: Precision::Bf16,
        threads: 3,
        deterministic: true,
        fingerprint: Some(digest("bits")),
    }
}

fn join() -> Join {
    Join {
        role: Role::Verifier,
        version: PROTOCOL_VERSION,
        class: class(),
        memory_bytes: 80 << 30,
        tokens_per_second: 100_000,
        addresses: addresses(),
        head_rounds: vec![Round(2), Round(3)],
    }
}

fn replayed(end: ReplayEnd) -> Replayed {
    let (round, worker) = (Round(4), coordinator().node_id());
    Replayed { round, worker, assignment: digest("assignment"), end }
}

fn end_state() -> ReplayEnd {
    ReplayEnd::At(EndState { theta: digest("own theta"), moments: digest("own moments") })
}

fn verdict(end: ReplayEnd) -> Request {
    let signed = SignedReplay::sign(&worker(), RUN, replayed(end));
    Request::Verdict(Verdict { id: 7, outcome: ReplayOutcome::Replayed(signed) })
}

fn effects() -> Vec<(NodeId, LossEffect)> {
    nodes(2).into_iter().zip([LossEffect(-3), LossEffect(i64::MAX)]).collect()
}

fn weigh() -> Weigh {
    let updates = nodes(2).into_iter().map(|node| (node, digest("payload"))).collect();
    Weigh { round: Round(4), theta: digest("theta"), updates }
}

fn requests() -> Vec<Request> {
    let possession = Possession::prove(Round(4), worker().node_id(), b"theta");
    vec![
        Request::Describe,
        Request::Join(join()),
        Request::Join(Join {
            addresses: vec![],
            head_rounds: vec![],
            role: Role::Worker,
            ..join()
        }),
        Request::Beat(Beat { theta: Some(possession), steps_done: 3, leaving: true }),
        Request::Beat(Beat { theta: None, steps_done: 0, leaving: false }),
        Request::Commit(SignedCommitment::sign(&worker(), RUN, commitment())),
        verdict(end_state()),
        verdict(ReplayEnd::Nowhere),
        verdict(ReplayEnd::Withheld("the moments were not opened".to_owned())),
        Request::Verdict(Verdict { id: 7, outcome: ReplayOutcome::Failed(String::new()) }),
        Request::Evaluation(Evaluation { round: Round(3), theta: digest("theta"), loss: 3.2 }),
        Request::Weighing(Weighing { round: Round(3), effects: vec![] }),
        Request::Weighing(Weighing { round: Round(3), effects: effects() }),
        Request::Leave,
        Request::Status,
    ]
}

fn replies() -> Vec<Reply> {
    let refusal =
        Refusal { code: RefusalCode::TooSlow, reason: "expected 10 s, got 20 s".to_owned() };
    let source = Source { node: coordinator().node_id(), addresses: addresses() };
    let merge = Merge {
        aggregate: digest("aggregate"),
        aggregate_bytes: 1 << 30,
        residual: digest("residual"),
        outer_learning_rate: 0.7,
    };
    let sync = |merge| {
        let sources = vec![source.clone(), source.clone()];
        Sync { round: Round(5), theta: digest("next"), theta_bytes: 1 << 34, merge, sources }
    };
    let entries = nodes(3).into_iter().map(|node| (node, digest("commitment"))).collect();
    let duties = [
        Duty::Gathering { workers: 1, workers_min: 4 },
        Duty::Train(assignment(Start::Fresh)),
        Duty::Train(assignment(HEAD)),
        Duty::Upload(CommitSet { round: Round(4), entries }),
        Duty::Wait { round: Round(4), reason: WaitReason::Tasks },
        Duty::Sync(sync(None)),
        Duty::Sync(sync(Some(merge))),
        Duty::Tasks(Tasks::default()),
        Duty::Tasks(Tasks {
            replays: vec![replay(Start::Fresh), replay(HEAD)],
            evaluations: vec![Evaluate { round: Round(4), theta: digest("theta") }],
            weigh: Some(weigh()),
        }),
        Duty::Complete { round: Round(9), theta: digest("last") },
        Duty::Dismissed(refusal.clone()),
    ];
    let mut replies: Vec<Reply> = duties
        .into_iter()
        .map(|duty| {
            Reply::Situation(Situation { duty, verifiers: nodes(2), evidence_from: Round(3) })
        })
        .collect();
    replies.push(Reply::Description { spec: b"[run]".to_vec(), round: Round(4) });
    replies.push(Reply::Refused(refusal));
    replies.push(Reply::Status(b"{}".to_vec()));
    replies
}

fn duty(duty: Duty) -> Reply {
    Reply::Situation(Situation { duty, verifiers: vec![], evidence_from: Round(0) })
}

fn sealed_reply(reply: &Reply) -> Vec<u8> {
    seal_reply(&coordinator(), heading(8), digest("request"), reply).expect("sealed")
}

fn open_our_reply(bytes: &[u8]) -> Result<Signed<Reply>, OpenError> {
    open_reply(bytes, RUN, coordinator().node_id(), digest("request"))
}

/// The field that sealing found wanting.
fn refused_field(sealed: Result<Vec<u8>, SealError>) -> &'static str {
    let Err(SealError::Message(error)) = sealed else { panic!("got {sealed:?}") };
    match error {
        MessageError::Missing { field }
        | MessageError::Length { field, .. }
        | MessageError::TooMany { field, .. }
        | MessageError::Value { field, .. }
        | MessageError::Order { field, .. } => field,
    }
}

fn refused_request(request: &Request) -> &'static str {
    refused_field(seal_request(&worker(), heading(1), request))
}

fn refused_reply(reply: &Reply) -> &'static str {
    refused_field(seal_reply(&coordinator(), heading(1), digest("request"), reply))
}

#[test]
fn every_request_comes_out_as_it_went_in() {
    for (nonce, request) in (0..).zip(requests()) {
        let sealed = seal_request(&worker(), heading(nonce), &request).expect("sealed");
        let opened = open_request(&sealed).expect("opened");
        assert_eq!(opened.message, request);
        assert_eq!((opened.run, opened.round, opened.nonce), (RUN, Round(4), nonce));
        assert_eq!(opened.signer, worker().node_id());
        assert_eq!(opened.digest, request_digest(&sealed));
        let body = wire::Request::decode(&opened.body[..]).expect("the body is the request");
        assert_eq!(Request::parse(body, RUN, opened.signer), Ok(request));
    }
}

#[test]
fn every_reply_comes_out_as_it_went_in() {
    for reply in replies() {
        let opened = open_our_reply(&sealed_reply(&reply)).expect("opened");
        assert_eq!(opened.message, reply);
        assert_eq!(opened.signer, coordinator().node_id());
    }
}

#[test]
fn an_announcement_is_of_its_run_and_sender() {
    let announcement = Announcement { run: RUN, round: Round(4), phase: 3 };
    let sealed = seal_announcement(&coordinator(), 5, &announcement).expect("sealed");
    let sender = coordinator().node_id();
    assert_eq!(open_announcement(&sealed, RUN, sender).expect("opened").message, announcement);
    let other = RunId::new([8; 32]);
    assert_eq!(
        open_announcement(&sealed, other, sender),
        Err(OpenError::Run { expected: other, got: RUN })
    );
    let expected = worker().node_id();
    assert_eq!(
        open_announcement(&sealed, RUN, expected),
        Err(OpenError::Signer { expected, got: sender })
    );
}

#[test]
fn a_reply_is_refused_for_another_run_sender_or_request() {
    let sealed = sealed_reply(&duty(Duty::Gathering { workers: 1, workers_min: 2 }));
    let (sender, request) = (coordinator().node_id(), digest("request"));
    let other_run = RunId::new([8; 32]);
    assert_eq!(
        open_reply(&sealed, other_run, sender, request),
        Err(OpenError::Run { expected: other_run, got: RUN })
    );
    assert_eq!(
        open_reply(&sealed, RUN, worker().node_id(), request),
        Err(OpenError::Signer { expected: worker().node_id(), got: sender })
    );
    assert_eq!(
        open_reply(&sealed, RUN, sender, digest("another")),
        Err(OpenError::AnotherRequest { expected: digest("another"), got: request })
    );
}

/// A sealed message whose envelope was changed after signing.
fn forged(bytes: &[u8], change: impl FnOnce(&mut wire::Envelope)) -> Vec<u8> {
    let mut envelope = wire::Envelope::decode(bytes).expect("an envelope");
    change(&mut envelope);
    envelope.encode_to_vec()
}

#[test]
fn no_signed_field_can_be_changed() {
    let sealed = seal_request(&worker(), heading(1), &Request::Leave).expect("sealed");
    let signature = |change: fn(&mut wire::Envelope)| {
        let Err(OpenError::Signature { .. }) = open_request(&forged(&sealed, change)) else {
            panic!("expected a refused signature");
        };
    };
    signature(|envelope| envelope.run = vec![8; 32]);
    signature(|envelope| envelope.round += 1);
    signature(|envelope| envelope.nonce += 1);
    signature(|envelope| envelope.signer = coordinator().node_id().as_bytes().to_vec());
    signature(|envelope| envelope.signature[0] ^= 1);
    signature(|envelope| {
        envelope.body = wire::Request::from(&Request::Describe).encode_to_vec();
    });
    let versioned = forged(&sealed, |envelope| envelope.version = PROTOCOL_VERSION + 1);
    let (expected, got) = (PROTOCOL_VERSION, PROTOCOL_VERSION + 1);
    assert_eq!(open_request(&versioned), Err(OpenError::Version { expected, got }));
}

#[test]
fn a_field_of_a_later_version_is_refused() {
    // Field 15, an integer 0: a decoder alone would skip it.
    let unknown = [0x78, 0];
    let mut sealed = seal_request(&worker(), heading(1), &Request::Leave).expect("sealed");
    sealed.extend(unknown);
    assert_eq!(open_request(&sealed), Err(OpenError::NotCanonical { part: "envelope" }));
    let mut body = wire::Reply::from(&Reply::Status(vec![])).encode_to_vec();
    body.extend(unknown);
    let refused = open_our_reply(&signed_body(body));
    assert_eq!(refused, Err(OpenError::NotCanonical { part: "reply" }));
}

#[test]
fn a_signature_of_another_direction_is_refused() {
    // But for the context, an announcement signs the same fields as a request.
    let announcement = Announcement { run: RUN, round: Round(4), phase: 0 };
    let sealed = seal_announcement(&coordinator(), 1, &announcement).expect("sealed");
    assert!(matches!(open_request(&sealed), Err(OpenError::Signature { .. })));

    let request = seal_request(&coordinator(), heading(1), &Request::Leave).expect("sealed");
    let as_reply =
        forged(&request, |envelope| envelope.request = digest("request").as_bytes().to_vec());
    assert!(matches!(open_our_reply(&as_reply), Err(OpenError::Signature { .. })));
    assert!(matches!(open_our_reply(&request), Err(OpenError::Message(_))));

    let reply = sealed_reply(&duty(Duty::Gathering { workers: 1, workers_min: 2 }));
    assert!(matches!(open_request(&reply), Err(OpenError::Message(_))));
    let as_request = forged(&reply, |envelope| envelope.request.clear());
    assert!(matches!(open_request(&as_request), Err(OpenError::Signature { .. })));
}

#[test]
fn a_commitment_can_be_checked_by_a_stranger_years_later() {
    let signed = SignedCommitment::sign(&worker(), RUN, commitment());
    let text = serde_json::to_string(&signed).expect("JSON");
    assert!(text.contains(&hex::encode(signed.signature)));
    let read: SignedCommitment = serde_json::from_str(&text).expect("read back");
    assert_eq!(read, signed);
    assert!(read.verify());

    let mut variants = vec![
        SignedCommitment { run: RunId::new([8; 32]), ..signed.clone() },
        SignedCommitment { worker: coordinator().node_id(), ..signed.clone() },
    ];
    let changes: [fn(&mut Commitment); 10] = [
        |commitment| commitment.round = Round(5),
        |commitment| commitment.first_sequence += 1,
        |commitment| commitment.assignment = digest("other"),
        |commitment| commitment.payload = digest("other"),
        |commitment| commitment.payload_bytes += 1,
        |commitment| commitment.theta = digest("other"),
        |commitment| commitment.moments = digest("other"),
        |commitment| commitment.error = digest("other"),
        |commitment| commitment.tokens.0 += 1,
        |commitment| commitment.loss = 4.0,
    ];
    variants.extend(changes.map(|change| {
        let mut changed = signed.clone();
        change(&mut changed.commitment);
        changed
    }));
    for changed in variants {
        assert!(!changed.verify(), "{changed:?}");
        assert_ne!(changed.digest(), signed.digest());
    }
    let resigned = SignedCommitment { signature: [0; 64], ..signed.clone() };
    assert_eq!(resigned.digest(), signed.digest(), "the digest is free of the signature");
}

#[test]
fn a_commitment_of_another_worker_or_run_cannot_be_handed_in() {
    let foreign = SignedCommitment::sign(&coordinator(), RUN, commitment());
    assert_eq!(refused_request(&Request::Commit(foreign)), "commit.signature");
    let elsewhere = SignedCommitment::sign(&worker(), RunId::new([8; 32]), commitment());
    assert_eq!(refused_request(&Request::Commit(elsewhere)), "commit.signature");
}

#[test]
fn a_verifier_stands_for_the_end_that_it_signed_and_for_no_other() {
    let signed = SignedReplay::sign(&worker(), RUN, replayed(end_state()));
    let text = serde_json::to_string(&signed).expect("JSON");
    let read: SignedReplay = serde_json::from_str(&text).expect("read back");
    assert_eq!(read, signed);
    assert!(read.verify());
    let mut variants = vec![
        SignedReplay { run: RunId::new([8; 32]), ..signed.clone() },
        SignedReplay { verifier: coordinator().node_id(), ..signed.clone() },
    ];
    let changes: [fn(&mut Replayed); 6] = [
        |replayed| replayed.assignment = digest("other"),
        |replayed| replayed.round = Round(5),
        |replayed| replayed.worker = worker().node_id(),
        |replayed| replayed.end = ReplayEnd::Nowhere,
        |replayed| replayed.end = ReplayEnd::Withheld(String::new()),
        |replayed| {
            let (theta, moments) = (digest("own moments"), digest("own theta"));
            replayed.end = ReplayEnd::At(EndState { theta, moments });
        },
    ];
    variants.extend(changes.map(|change| {
        let mut changed = signed.clone();
        change(&mut changed.replayed);
        changed
    }));
    for changed in variants {
        assert!(!changed.verify(), "{changed:?}");
    }
    let foreign = SignedReplay::sign(&coordinator(), RUN, replayed(end_state()));
    let outcome = ReplayOutcome::Replayed(foreign);
    let verdict = Request::Verdict(Verdict { id: 7, outcome });
    assert_eq!(refused_request(&verdict), "replay.signature");
}

#[test]
fn a_commit_set_is_named_by_all_that_it_holds() {
    let set = |round, count| {
        let entries = nodes(count).into_iter().map(|node| (node, digest("one"))).collect();
        CommitSet { round: Round(round), entries }.digest()
    };
    assert_eq!(set(1, 2), set(1, 2));
    assert_ne!(set(1, 2), set(2, 2));
    assert_ne!(set(1, 2), set(1, 3));
}

/// Bytes signed by the coordinator as a reply's body, whatever they are.
fn signed_body(body: Vec<u8>) -> Vec<u8> {
    envelope::seal_body::<Reply>(&coordinator(), heading(1), Some(digest("request")), body)
}

#[derive(Debug, Clone)]
enum Mutation {
    Set(prop::sample::Index, u8),
    Insert(prop::sample::Index, u8),
    Remove(prop::sample::Index),
    Cut(prop::sample::Index),
    Append(Vec<u8>),
}

fn mutation() -> impl Strategy<Value = Mutation> {
    prop_oneof![
        (any::<prop::sample::Index>(), any::<u8>()).prop_map(|(at, byte)| Mutation::Set(at, byte)),
        (any::<prop::sample::Index>(), any::<u8>())
            .prop_map(|(at, byte)| Mutation::Insert(at, byte)),
        any::<prop::sample::Index>().prop_map(Mutation::Remove),
        any::<prop::sample::Index>().prop_map(Mutation::Cut),
        prop::collection::vec(any::<u8>(), 0..8).prop_map(Mutation::Append),
    ]
}

fn mutate(bytes: &mut Vec<u8>, mutations: Vec<Mutation>) {
    for mutation in mutations {
        let len = bytes.len();
        match mutation {
            Mutation::Set(at, byte) if len > 0 => bytes[at.index(len)] = byte,
            Mutation::Insert(at, byte) => bytes.insert(at.index(len + 1), byte),
            Mutation::Remove(at) if len > 0 => drop(bytes.remove(at.index(len))),
            Mutation::Cut(at) => bytes.truncate(at.index(len + 1)),
            Mutation::Append(more) => bytes.extend(more),
            Mutation::Set(..) | Mutation::Remove(_) => {}
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_changed_envelope_is_refused(
        request in prop::sample::select(requests()),
        mutations in prop::collection::vec(mutation(), 1..4),
    ) {
        let sealed = seal_request(&worker(), heading(1), &request).expect("sealed");
        let mut changed = sealed.clone();
        mutate(&mut changed, mutations);
        match open_request(&changed) {
            Ok(_) => prop_assert_eq!(changed, sealed),
            Err(refused) => prop_assert!(!refused.to_string().is_empty()),
        }
    }

    /// Even the holder of the key gets nothing through but the one form of a valid message.
    #[test]
    fn a_changed_body_that_is_signed_is_refused_or_means_what_it_says(
        reply in prop::sample::select(replies()),
        mutations in prop::collection::vec(mutation(), 0..4),
    ) {
        let mut body = wire::Reply::from(&reply).encode_to_vec();
        mutate(&mut body, mutations);
        if let Ok(opened) = open_our_reply(&signed_body(body.clone())) {
            prop_assert_eq!(wire::Reply::from(&opened.message).encode_to_vec(), body);
        }
    }

    #[test]
    fn noise_is_refused(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        prop_assert!(open_request(&bytes).is_err());
        prop_assert!(open_our_reply(&bytes).is_err());
        prop_assert!(open_our_reply(&signed_body(bytes.clone())).is_err()
            || Reply::try_from(wire::Reply::decode(&bytes[..]).expect("protobuf")).is_ok());
    }
}
