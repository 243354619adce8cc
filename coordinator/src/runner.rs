//! The effects that are under way.

use std::collections::BTreeMap;
use std::sync::Arc;

use manyhands_rules::coordinator::Effect;
use tokio::task::{AbortHandle, JoinError, JoinSet};

use crate::context::Context;
use crate::effects::{self, Done, EffectError};
use crate::metrics::EFFECTS;

/// An effect that ended, and what it came to.
pub(crate) type Ended = (Effect, Done);

pub(crate) struct Runner {
    context: Arc<Context>,
    tasks: JoinSet<(u64, Result<Done, EffectError>)>,
    running: BTreeMap<u64, (Effect, AbortHandle)>,
    next: u64,
}

impl Runner {
    pub(crate) fn new(context: Arc<Context>) -> Self {
        Self { context, tasks: JoinSet::new(), running: BTreeMap::new(), next: 0 }
    }

    pub(crate) fn start(&mut self, effect: Effect) {
        let (number, context) = (self.next, self.context.clone());
        self.next += 1;
        count(&effect, "started");
        let work = effect.clone();
        let abort =
            self.tasks.spawn(async move { (number, effects::perform(context, work).await) });
        self.running.insert(number, (effect, abort));
    }

    /// Stops what nobody waits for any more.
    pub(crate) fn keep(&mut self, is_wanted: impl Fn(&Effect) -> bool) {
        self.running.retain(|_, (effect, abort)| {
            let wanted = is_wanted(effect);
            if !wanted {
                abort.abort();
                count(effect, "unwanted");
            }
            wanted
        });
    }

    /// Waits for an effect to end; for ever if none is under way. None: one ended that was stopped.
    ///
    /// # Errors
    /// The [`EffectError`] that ends the service.
    pub(crate) async fn next(&mut self) -> Result<Option<Ended>, EffectError> {
        match self.tasks.join_next().await {
            Some(joined) => self.ended(joined),
            None => std::future::pending().await,
        }
    }

    /// An effect that has ended by now.
    ///
    /// # Errors
    /// As [`Self::next`].
    pub(crate) fn try_next(&mut self) -> Result<Option<Ended>, EffectError> {
        while let Some(joined) = self.tasks.try_join_next() {
            if let Some(ended) = self.ended(joined)? {
                return Ok(Some(ended));
            }
        }
        Ok(None)
    }

    fn ended(
        &mut self,
        joined: Result<(u64, Result<Done, EffectError>), JoinError>,
    ) -> Result<Option<Ended>, EffectError> {
        match joined {
            Ok((number, result)) => {
                let Some((effect, _)) = self.running.remove(&number) else { return Ok(None) };
                count(&effect, "done");
                Ok(Some((effect, result?)))
            }
            Err(error) if error.is_cancelled() => Ok(None),
            Err(error) => Err(EffectError::Panicked(error.to_string())),
        }
    }
}

fn count(effect: &Effect, end: &'static str) {
    metrics::counter!(EFFECTS, "effect" => effects::name(effect), "end" => end).increment(1);
}
