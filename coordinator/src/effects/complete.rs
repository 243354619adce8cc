//! Ending the run on chain.

use std::sync::Arc;

use manyhands_proto::Digest;
use manyhands_rules::coordinator::Input;

use crate::context::Context;
use crate::retry::Backoff;

const WHAT: &str = "completing the run on chain";

pub(super) async fn complete(context: &Arc<Context>, theta: Digest) -> Input {
    let Some(chain) = &context.chain else { return Input::RunCompleted };
    let mut backoff = Backoff::for_chain();
    while let Err(error) = chain.complete_run(&context.key, &context.run, theta).await {
        tracing::warn!(%error, "the run is not completed on chain yet; trying again");
        context.notes.report(WHAT, error.to_string());
        backoff.wait().await;
    }
    context.notes.clear(WHAT);
    Input::RunCompleted
}
