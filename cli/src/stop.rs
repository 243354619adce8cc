//! Ending on request: the first asks, the second insists.

use std::io::Read;

use tokio::sync::watch;

/// The shell's code for a program that ended by Ctrl-C.
const INTERRUPTED: i32 = 130;

/// Becomes true at the first Ctrl-C or SIGTERM, or when standard input ends if that is asked for. The
/// second ends the process at once: everything here survives being killed.
pub(crate) fn requested(with_stdin: bool) -> watch::Receiver<bool> {
    let (stop, stopping) = watch::channel(false);
    let stop = std::sync::Arc::new(stop);
    if with_stdin {
        let stop = stop.clone();
        // Not a task: a read of standard input cannot be given up when the runtime ends.
        std::thread::spawn(move || {
            let mut bytes = [0; 1024];
            while std::io::stdin().read(&mut bytes).is_ok_and(|count| count > 0) {}
            stop.send_replace(true);
        });
    }
    tokio::spawn(async move {
        interrupt().await;
        if stop.send_replace(true) {
            std::process::exit(INTERRUPTED);
        }
        interrupt().await;
        std::process::exit(INTERRUPTED);
    });
    stopping
}

#[cfg(unix)]
async fn interrupt() {
    use tokio::signal::unix::{SignalKind, signal};
    let Ok(mut terminate) = signal(SignalKind::terminate()) else {
        return ctrl_c().await;
    };
    tokio::select! {
        () = ctrl_c() => {}
        _ = terminate.recv() => {}
    }
}

#[cfg(not(unix))]
async fn interrupt() {
    ctrl_c().await;
}

async fn ctrl_c() {
    if let Err(error) = tokio::signal::ctrl_c().await {
        tracing::warn!(%error, "Ctrl-C cannot be heard; kill the process to end it");
        std::future::pending::<()>().await;
    }
}

/// Waits until stopping is asked for.
pub(crate) async fn wait(mut stop: watch::Receiver<bool>) {
    if stop.wait_for(|stop| *stop).await.is_err() {
        std::future::pending::<()>().await;
    }
}
