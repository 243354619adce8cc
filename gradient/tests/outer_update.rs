use manyhands_gradient::aggregate::WorkerUpdate;
use manyhands_gradient::codec::Update;
use manyhands_gradient::{Admitted, Layout, OuterUpdate, ParseOuterUpdateError, Revoked, merge};
use manyhands_proto::TokenCount;
use manyhands_proto::run_file::{Aggregation, Clip, Denominator, Profile};

use crate::support::{matrix, noise, update_of, worker};

const CONFIG: Aggregation = Aggregation {
    denominator: Denominator::Contributors,
    clip: Clip::None,
    outer_learning_rate: 1.0,
    outer_learning_rate_final: 0.4,
};

/// Four workers that trained on equally many tokens.
fn admitted(updates: &[Update]) -> Vec<(WorkerUpdate<'_>, TokenCount)> {
    (1_u8..)
        .zip(updates)
        .map(|(number, update)| (WorkerUpdate { worker: worker(number), update }, TokenCount(9)))
        .collect()
}

fn updates(layout: &Layout, first_seed: u64) -> Vec<Update> {
    (first_seed..first_seed + 4).map(|seed| update_of(layout, Profile::Standard, seed)).collect()
}

#[test]
fn a_round_that_takes_back_a_cheat_ends_where_honest_rounds_would_have() {
    let layout = matrix(3);
    let (first, second) = (updates(&layout, 0), updates(&layout, 4));
    let (first, second) = (admitted(&first), admitted(&second));
    let step = |updates: &[_], alpha, revoked: &[Revoked<'_>]| {
        merge(&layout, &CONFIG, Admitted { updates, alpha }, revoked).expect("they fit")
    };
    let start = noise(&layout, 9, 0.02);

    let mut theta = start.clone();
    step(&first, 1.0, &[]).apply(&mut theta);
    let cheat = Revoked { worker: worker(4), from: Admitted { updates: &first, alpha: 1.0 } };
    let correction = step(&second, 0.7, &[cheat]);
    correction.apply(&mut theta);

    let mut honest = start;
    step(&first[..3], 1.0, &[]).apply(&mut honest);
    step(&second, 0.7, &[]).apply(&mut honest);
    for (theta, honest) in theta.iter().zip(&honest) {
        assert!((theta - honest).abs() < 1e-7, "{theta} {honest}");
    }

    // It travels as bytes, and what was changed on the way is refused.
    let bytes = correction.to_bytes();
    assert_eq!(OuterUpdate::parse(&bytes, &layout).as_ref(), Ok(&correction));
    let parse = |bytes: &[u8]| OuterUpdate::parse(bytes, &layout);
    let with = |at: usize, byte: u8| {
        let mut bytes = bytes.clone();
        bytes[at] = byte;
        parse(&bytes)
    };
    assert!(matches!(with(0, 9), Err(ParseOuterUpdateError::Version { got: 9 })));
    assert!(matches!(with(4, 1), Err(ParseOuterUpdateError::Terms { .. })));
    assert!(matches!(with(8, 0x7f), Err(ParseOuterUpdateError::LearningRate { .. })));
    assert!(matches!(with(16, 1), Err(ParseOuterUpdateError::Length { .. })));
    assert!(matches!(
        parse(&[&bytes[..], &[0]].concat()),
        Err(ParseOuterUpdateError::Trailing { got: 1 })
    ));
    for length in 0..bytes.len() {
        assert!(parse(&bytes[..length]).is_err());
    }
}
