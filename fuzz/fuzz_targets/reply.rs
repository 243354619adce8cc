//! What a coordinator says: whatever body it signs, a member refuses it or reads what it means, in the one form that
//! means it.
#![no_main]

use std::alloc::System;
use std::sync::LazyLock;

use cap::Cap;
use libfuzzer_sys::fuzz_target;
use manyhands_proto::keys::NodeKey;
use manyhands_proto::message::{Heading, open_reply, seal_reply};
use manyhands_proto::{Digest, PROTOCOL_VERSION, Round, RunId};

/// An allocation past this aborts: some tens of times what a body of the fuzzer's length can hold.
#[global_allocator]
static MEMORY: Cap<System> = Cap::new(System, 16 << 20);

const RUN: RunId = RunId::new([9; 32]);
const HEADING: Heading = Heading { run: RUN, round: Round(4), nonce: 5 };

static KEY: LazyLock<NodeKey> = LazyLock::new(|| NodeKey::from_seed([2; 32]));

/// An envelope around a body, as the documentation of the protocol has it: the library seals only what it would open.
fn sealed(request: Digest, body: &[u8]) -> Vec<u8> {
    let signer = KEY.node_id();
    let signed = [
        b"manyhands 2026 reply\0".as_slice(),
        &PROTOCOL_VERSION.to_le_bytes(),
        RUN.as_bytes(),
        &HEADING.round.0.to_le_bytes(),
        &HEADING.nonce.to_le_bytes(),
        signer.as_bytes(),
        request.as_bytes(),
        body,
    ];
    let signature = KEY.sign(&signed.concat());
    let mut envelope = Vec::new();
    bytes(&mut envelope, 1, RUN.as_bytes());
    envelope.extend([2 << 3, HEADING.round.0 as u8, 3 << 3, HEADING.nonce as u8]);
    bytes(&mut envelope, 4, signer.as_bytes());
    bytes(&mut envelope, 5, &signature);
    bytes(&mut envelope, 6, body);
    bytes(&mut envelope, 7, request.as_bytes());
    envelope.extend([8 << 3, PROTOCOL_VERSION as u8]);
    envelope
}

/// A field of bytes in protobuf's form; nothing if there are none.
fn bytes(to: &mut Vec<u8>, field: u8, value: &[u8]) {
    if value.is_empty() {
        return;
    }
    to.push(field << 3 | 2);
    let mut length = value.len();
    while length >= 128 {
        to.push(length as u8 | 128);
        length >>= 7;
    }
    to.push(length as u8);
    to.extend_from_slice(value);
}

fuzz_target!(|body: &[u8]| {
    let request = Digest::of(b"a request");
    let envelope = sealed(request, body);
    if let Ok(opened) = open_reply(&envelope, RUN, KEY.node_id(), request) {
        let again = seal_reply(&KEY, HEADING, request, &opened.message).expect("it was opened");
        assert_eq!(again, envelope, "one message has one form");
    }
});
