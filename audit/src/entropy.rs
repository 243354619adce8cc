//! Randomness: the hash of one certain block after an anchor.

use std::collections::BTreeMap;

use manyhands_chain_client::ReadError;
use manyhands_chain_client::types::Stage;
use manyhands_proto::run_file::{ChainKind, RunSpec};
use manyhands_proto::{Digest, Round};
use manyhands_rules::record::Entropy;

use crate::chain_view::ChainView;
use crate::on_chain::OnChain;
use crate::records::Records;
use crate::report::{Findings, Link};

/// The block that gives the randomness comes this many after the anchor's. Were later ones allowed,
/// the coordinator could choose among them.
const ENTROPY_DELAY_BLOCKS: u32 = 2;

/// All uses of randomness: over the commitments of a round, and over its admitted set.
fn uses(records: &Records) -> impl Iterator<Item = (Round, Stage, Option<Entropy>)> + '_ {
    records.all.iter().flat_map(|record| {
        let trained = !record.candidates.is_empty();
        let own = trained.then_some((record.round, Stage::Commit, record.commitments_entropy));
        let draws =
            record.draws.iter().map(|draw| (draw.round, Stage::Admitted, Some(draw.entropy)));
        own.into_iter().chain(draws)
    })
}

/// Compares every recorded value with the chain's block.
pub(crate) async fn check<C: ChainView>(
    records: &Records,
    on_chain: &OnChain,
    chain: &C,
    findings: &mut Findings,
) -> Result<(), ReadError> {
    let mut hashes: BTreeMap<u32, Option<Digest>> = BTreeMap::new();
    for (round, stage, entropy) in uses(records) {
        let at = Link::EntropyBlock.at(round);
        let Some(anchor) = on_chain.anchors.get(&(round, stage)) else {
            // Its absence is a finding of its own.
            findings.unchecked(at, "a block after the anchor", "no anchor");
            continue;
        };
        let number = anchor.block.saturating_add(ENTROPY_DELAY_BLOCKS);
        let Some(Entropy { value, block: Some(block) }) = entropy else {
            findings.failed(at, format!("the hash of block {number}"), "randomness of no block");
            continue;
        };
        if !findings.same(at, "block", (number, block)) {
            continue;
        }
        let hash = match hashes.get(&number) {
            Some(hash) => *hash,
            None => {
                let hash = chain.block_hash(number).await?;
                hashes.insert(number, hash);
                hash
            }
        };
        match hash {
            Some(hash) => _ = findings.same(at, "block hash", (hash, value)),
            None => findings.failed(at, format!("a finalised block {number}"), "none"),
        }
    }
    Ok(())
}

/// Without a chain randomness is the coordinator's signature: nobody else can tell.
pub(crate) fn without_chain(spec: &RunSpec, records: &Records, findings: &mut Findings) {
    if spec.chain.kind == ChainKind::Substrate {
        let why = "no chain was asked";
        findings.unchecked(Link::EntropyBlock.of_run(), "the hash of a block", why);
        return;
    }
    for (round, _, entropy) in uses(records) {
        let at = Link::EntropyBlock.at(round);
        if entropy.is_none_or(|entropy| entropy.block.is_some()) {
            findings.failed(
                at,
                "randomness without a block, as there is no chain",
                "none, or a block's",
            );
        }
    }
    let why = "without a chain it is the coordinator's word that randomness came later";
    findings.unchecked(Link::EntropyBlock.of_run(), "the hash of a block", why);
}
