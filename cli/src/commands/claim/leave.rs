//! Leaving a run: the stake or the bond back, as far as the chain lets it go now.
//!
//! What to do next follows from the chain's state alone, so that the command can be given again at any
//! time and goes on where the last one ended.

use manyhands_chain_client::types::{Fault, FaultState, RunState, Verifier, Worker};
use manyhands_chain_client::{ChainClient, ChainState, ReadError, TrainingEvent};
use manyhands_proto::keys::NodeKey;
use manyhands_proto::{Balance, NodeId, Round, RunId};
use serde::Serialize;

use crate::failure::Failure;

/// A worker takes three steps and a verifier two; each is seen in the state before the next.
const STEPS_MAX: usize = 6;

/// What was done about leaving, and what is still to wait for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Left {
    /// In order.
    done: Vec<Step>,
    /// What came back to the account now.
    returned: Balance,
    held: Vec<Held>,
    /// The finalised block as of which this is so.
    block: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Step {
    LeaveRun,
    AnnounceExit,
    WithdrawStake,
    RetireVerifier,
    WithdrawBond,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Purpose {
    Stake,
    Bond,
}

/// Money that stays on hold, and until when.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Held {
    purpose: Purpose,
    amount: Balance,
    #[serde(flatten)]
    wait: Wait,
}

/// What has to come to pass first. Blocks are the first in which the command gets further.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "waits_for")]
enum Wait {
    /// Faults of the work that was done can still be reported until then.
    Unbonding { until_block: u32 },
    /// The stake answers for other runs too, and comes back once all are left.
    OtherRuns { runs: usize },
    /// Faults of the account that are not decided; those of this run are listed.
    Faults { open: u32, in_this_run: Vec<Undecided> },
    /// What the verifier is accused of.
    Disputes { open: u32 },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
struct Undecided {
    round: Round,
    /// From then on anybody may have it decided, if the verifiers do not do so before.
    until_block: u32,
}

/// What the chain says about the account's money in the run.
struct Situation {
    run: RunId,
    /// The block that a call made now is in, at the earliest.
    next_block: u32,
    worker: Option<Worker>,
    verifier: Option<Verifier>,
    /// Other runs that the worker has not left and that are not over.
    runs_elsewhere: usize,
    undecided: Vec<Undecided>,
}

/// What is to be done about one hold.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Next {
    Do(Step),
    Wait(Held),
    /// There is nothing on hold.
    Nothing,
}

/// Does what can be done now. Doing it again does no harm.
///
/// # Errors
/// What the chain refuses, and a node that does not show what was done.
pub(super) async fn leave(chain: &ChainClient, key: &NodeKey, run: RunId) -> Result<Left, Failure> {
    let (mut done, mut returned) = (Vec::new(), Balance(0));
    for _ in 0..STEPS_MAX {
        let state = chain.state().await?;
        let situation = Situation::read(&state, key.node_id(), run).await?;
        let (step, held) = match (situation.of_stake(), situation.of_bond()) {
            (Next::Do(step), Next::Do(_) | Next::Wait(_) | Next::Nothing)
            | (Next::Wait(_) | Next::Nothing, Next::Do(step)) => (Some(step), Vec::new()),
            (Next::Wait(stake), Next::Wait(bond)) => (None, vec![stake, bond]),
            (Next::Wait(held), Next::Nothing) | (Next::Nothing, Next::Wait(held)) => {
                (None, vec![held])
            }
            (Next::Nothing, Next::Nothing) => (None, Vec::new()),
        };
        let Some(step) = step else {
            return Ok(Left { done, returned, held, block: state.block().number });
        };
        returned.0 += situation.take(chain, key, step).await?.0;
        done.push(step);
    }
    Err(Failure::new(
        "chain_behind",
        "the node does not show what was done in the run",
        "wait until the node has caught up, and give the command again",
    ))
}

impl Situation {
    async fn read(state: &ChainState, account: NodeId, run: RunId) -> Result<Self, ReadError> {
        let worker = state.worker(&account).await?;
        let mut runs_elsewhere = 0;
        for membership in worker.iter().flat_map(|worker| &worker.memberships) {
            if membership.run != run && membership.exposed_until.is_none() {
                let other = state.run(&membership.run).await?;
                runs_elsewhere += usize::from(other.is_some_and(|other| !is_over(&other.state)));
            }
        }
        let faults = match &worker {
            Some(worker) if worker.open_faults > 0 => state.faults(&run).await?,
            Some(_) | None => Vec::new(),
        };
        let of_account = faults.iter().filter(|((accused, _), _)| *accused == account);
        let undecided =
            of_account.filter_map(|((_, round), fault)| undecided(*round, fault)).collect();
        Ok(Self {
            run,
            next_block: state.block().number.saturating_add(1),
            worker,
            verifier: state.verifier(&run, &account).await?,
            runs_elsewhere,
            undecided,
        })
    }

    fn of_stake(&self) -> Next {
        let Some(worker) = &self.worker else { return Next::Nothing };
        let wait = |wait| Next::Wait(Held { purpose: Purpose::Stake, amount: worker.stake, wait });
        if worker.is_member(&self.run) {
            return Next::Do(Step::LeaveRun);
        }
        match worker.exit_at {
            // Announcing the exit would leave those runs too.
            None if self.runs_elsewhere > 0 => wait(Wait::OtherRuns { runs: self.runs_elsewhere }),
            None => Next::Do(Step::AnnounceExit),
            Some(until_block) if self.next_block < until_block => {
                wait(Wait::Unbonding { until_block })
            }
            Some(_) if worker.open_faults > 0 => {
                wait(Wait::Faults { open: worker.open_faults, in_this_run: self.undecided.clone() })
            }
            Some(_) => Next::Do(Step::WithdrawStake),
        }
    }

    fn of_bond(&self) -> Next {
        let Some(verifier) = &self.verifier else { return Next::Nothing };
        let wait = |wait| Next::Wait(Held { purpose: Purpose::Bond, amount: verifier.bond, wait });
        match verifier.exit_at {
            None => Next::Do(Step::RetireVerifier),
            Some(until_block) if self.next_block < until_block => {
                wait(Wait::Unbonding { until_block })
            }
            Some(_) if verifier.open_faults > 0 => {
                wait(Wait::Disputes { open: verifier.open_faults })
            }
            Some(_) => Next::Do(Step::WithdrawBond),
        }
    }

    /// Takes a step; what comes back to the account by it.
    async fn take(
        &self,
        chain: &ChainClient,
        key: &NodeKey,
        step: Step,
    ) -> Result<Balance, Failure> {
        let submission = match step {
            Step::LeaveRun => chain.leave_run(key, &self.run).await?,
            Step::AnnounceExit => chain.announce_exit(key).await?,
            Step::WithdrawStake => chain.withdraw_stake(key).await?,
            Step::RetireVerifier => chain.retire_verifier(key, &self.run).await?,
            Step::WithdrawBond => chain.withdraw_verifier_bond(key, &self.run).await?,
        };
        Ok(Balance(submission.events().iter().map(|event| withdrawn(event).0).sum()))
    }
}

/// What an event says to have come back to an account.
fn withdrawn(event: &TrainingEvent) -> Balance {
    if let TrainingEvent::StakeWithdrawn { amount, .. }
    | TrainingEvent::VerifierBondWithdrawn { amount, .. } = event
    {
        *amount
    } else {
        Balance(0)
    }
}

fn is_over(state: &RunState) -> bool {
    match state {
        RunState::Active | RunState::Paused(_) => false,
        RunState::Closed { .. } | RunState::Settled => true,
    }
}

fn undecided(round: Round, fault: &Fault) -> Option<Undecided> {
    match fault.state {
        FaultState::Reported { executable_at: until_block }
        | FaultState::Contested { resolves_at: until_block, .. } => {
            Some(Undecided { round, until_block })
        }
        FaultState::Executed { .. } | FaultState::Dismissed => None,
    }
}

impl Left {
    /// A line for each thing that was done or is still to wait for.
    pub(super) fn words(&self) -> Vec<String> {
        let mut words: Vec<String> = self.done.iter().map(|step| step.words().to_owned()).collect();
        if self.returned > Balance(0) {
            words.push(format!("{} came back to the account", self.returned));
        }
        words.extend(self.held.iter().map(|held| held.words(self.block)));
        if !self.held.is_empty() {
            words.push("give the same command again then".to_owned());
        } else if words.is_empty() {
            words.push("this account has nothing on hold in the run".to_owned());
        }
        words
    }
}

impl Step {
    fn words(self) -> &'static str {
        match self {
            Self::LeaveRun => "the run is left: no later round can cost the stake",
            Self::AnnounceExit => "the exit is announced: the stake is on its way back",
            Self::WithdrawStake => "the stake is withdrawn",
            Self::RetireVerifier => "the verifier is retired: its bond is on its way back",
            Self::WithdrawBond => "the verifier's bond is withdrawn",
        }
    }
}

impl Held {
    fn words(&self, block: u32) -> String {
        let purpose = match self.purpose {
            Purpose::Stake => "stake",
            Purpose::Bond => "bond",
        };
        let what = format!("the {purpose} of {} stays on hold", self.amount);
        match &self.wait {
            Wait::Unbonding { until_block } => format!(
                "{what} until block {until_block}, as faults can be reported so long; this is block \
                 {block}"
            ),
            Wait::OtherRuns { runs } => {
                format!("{what}, as it answers for other runs too, which are not left: {runs}")
            }
            Wait::Faults { open, in_this_run } => {
                let each = in_this_run.iter().map(|fault| {
                    format!("of round {}, decided by block {}", fault.round, fault.until_block)
                });
                let each: Vec<_> = each.collect();
                let named =
                    if each.is_empty() { "of another run".to_owned() } else { each.join("; ") };
                format!(
                    "{what} until every fault of this account is decided: {open} open ({named}); \
                     this is block {block}"
                )
            }
            Wait::Disputes { open } => format!(
                "{what} until what it is accused of is decided: {open} open; this is block {block}"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use manyhands_chain_client::types::Membership;
    use manyhands_proto::Digest;

    use super::*;

    const RUN: RunId = RunId::new([1; 32]);

    fn worker(exposed_until: Option<u32>, exit_at: Option<u32>, open_faults: u32) -> Worker {
        Worker {
            peer_id: Vec::new(),
            capability_digest: Digest::of(b"capability"),
            stake: Balance(100),
            registered_at: 1,
            exit_at,
            open_faults,
            memberships: vec![Membership { run: RUN, joined_at: 1, exposed_until }],
        }
    }

    fn situation(worker: Option<Worker>, verifier: Option<Verifier>) -> Situation {
        let undecided = vec![Undecided { round: Round(3), until_block: 60 }];
        Situation { run: RUN, next_block: 50, worker, verifier, runs_elsewhere: 0, undecided }
    }

    fn waits(purpose: Purpose, wait: Wait) -> Next {
        Next::Wait(Held { purpose, amount: Balance(100), wait })
    }

    #[test]
    fn a_worker_leaves_then_announces_then_waits_then_withdraws() {
        let next = |worker| situation(Some(worker), None).of_stake();
        assert_eq!(situation(None, None).of_stake(), Next::Nothing);
        assert_eq!(next(worker(None, None, 0)), Next::Do(Step::LeaveRun));
        assert_eq!(next(worker(Some(60), None, 0)), Next::Do(Step::AnnounceExit));
        let unbonding = waits(Purpose::Stake, Wait::Unbonding { until_block: 51 });
        assert_eq!(next(worker(Some(51), Some(51), 0)), unbonding);
        assert_eq!(next(worker(Some(50), Some(50), 0)), Next::Do(Step::WithdrawStake));
        let in_this_run = vec![Undecided { round: Round(3), until_block: 60 }];
        let faults = waits(Purpose::Stake, Wait::Faults { open: 1, in_this_run });
        assert_eq!(next(worker(Some(50), Some(50), 1)), faults);
    }

    #[test]
    fn a_stake_that_answers_for_another_run_stays_until_that_is_left_too() {
        let mut busy = situation(Some(worker(None, None, 0)), None);
        busy.runs_elsewhere = 2;
        assert_eq!(busy.of_stake(), Next::Do(Step::LeaveRun));
        busy.worker = Some(worker(Some(60), None, 0));
        assert_eq!(busy.of_stake(), waits(Purpose::Stake, Wait::OtherRuns { runs: 2 }));
    }

    #[test]
    fn a_verifier_retires_then_waits_then_withdraws() {
        let next = |exit_at, open_faults| {
            let verifier = Verifier { bond: Balance(100), registered_at: 1, exit_at, open_faults };
            situation(None, Some(verifier)).of_bond()
        };
        assert_eq!(situation(None, None).of_bond(), Next::Nothing);
        assert_eq!(next(None, 0), Next::Do(Step::RetireVerifier));
        let unbonding = waits(Purpose::Bond, Wait::Unbonding { until_block: 70 });
        assert_eq!(next(Some(70), 1), unbonding);
        assert_eq!(next(Some(50), 1), waits(Purpose::Bond, Wait::Disputes { open: 1 }));
        assert_eq!(next(Some(50), 0), Next::Do(Step::WithdrawBond));
    }

    #[test]
    fn what_is_still_to_wait_for_is_said_with_its_block() {
        let amount = Balance(5_000_000_000_000);
        let wait = Wait::Unbonding { until_block: 70 };
        let held = vec![Held { purpose: Purpose::Stake, amount, wait }];
        let left = Left { done: vec![Step::LeaveRun], returned: Balance(0), held, block: 49 };
        let words = left.words().join("\n");
        assert!(words.contains("5 tokens") && words.contains("block 70"), "{words}");
        assert!(words.contains("this is block 49"), "{words}");
        let nothing = Left { done: Vec::new(), returned: Balance(0), held: Vec::new(), block: 49 };
        assert_eq!(nothing.words(), ["this account has nothing on hold in the run"]);
    }
}
