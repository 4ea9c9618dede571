//! `rethaw top`: what the service is doing, over the same feed as the dashboard.
//!
//! On a terminal a picture that is drawn anew at every change; elsewhere a block of text, or a line
//! of JSON, for every interval of the feed.

mod feed;
mod screen;
mod view;

use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use serde_json::Value;
use time::OffsetDateTime;
use tokio::signal::unix::{SignalKind, signal};

use super::{Context, output};
use feed::{Feed, State, Update};
use screen::Screen;

/// Pause before a lost connection is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// Flags of `rethaw top`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  rethaw top
  rethaw top --once
  rethaw top --once --json | jq '.pools[] | {template, ready, target}'
  rethaw top --json | jq -c '.point.claims_warm'

Keys: q or Ctrl-C ends it. Into a pipe it writes a block, or with --json a line, every two seconds;
with --json its member \"point\" is the interval that just ended.

Related: ls, pool ls.")]
pub struct TopArgs {
    /// Look once and end
    #[arg(long)]
    pub once: bool,
}

/// Runs it.
pub async fn run(cx: &Context, args: &TopArgs) -> anyhow::Result<ExitCode> {
    if args.once {
        let stats: Value = cx.client.get("/v1/stats").await?;
        if cx.json {
            output::json(&stats)?;
        } else {
            output::write(text(cx, &State::new(stats), view::Style::plain())?.as_bytes())?;
        }
    } else if !cx.json && std::io::stdout().is_terminal() {
        watch(cx).await?;
    } else {
        report(cx).await?;
    }
    Ok(ExitCode::SUCCESS)
}

fn text(cx: &Context, state: &State, style: view::Style) -> anyhow::Result<String> {
    let stats = state.parse().map_err(|e| cx.client.unexpected(&e.to_string()))?;
    Ok(view::render(&stats, OffsetDateTime::now_utc(), style))
}

/// One report for every interval, until the service or the reader ends it.
async fn report(cx: &Context) -> anyhow::Result<()> {
    let mut feed = Feed::open(&cx.client).await?;
    loop {
        let Some(update) = feed.next().await? else {
            anyhow::bail!("{} ended the feed", cx.client.url());
        };
        match update {
            Update::Change => {}
            Update::Interval if cx.json => output::line(&feed.state().report().to_string())?,
            Update::Interval => {
                let block = text(cx, feed.state(), view::Style::plain())?;
                output::write(format!("{block}\n").as_bytes())?;
            }
        }
    }
}

/// The picture on a terminal, until a key or a signal ends it.
async fn watch(cx: &Context) -> anyhow::Result<()> {
    // Refusals and a wrong address are said on an ordinary screen.
    let mut feed = Feed::open(&cx.client).await?;
    let mut screen = Screen::enter()?;
    let mut interrupted = signal(SignalKind::interrupt())?;
    let mut terminated = signal(SignalKind::terminate())?;
    let mut resized = signal(SignalKind::window_change())?;
    let mut lost = false;
    loop {
        tokio::select! {
            () = screen.quit() => return Ok(()),
            _ = interrupted.recv() => return Ok(()),
            _ = terminated.recv() => return Ok(()),
            _ = resized.recv() => {}
            update = feed.next(), if !lost => lost = !matches!(update, Ok(Some(_))),
            again = reopen(cx), if lost => {
                feed = again;
                lost = false;
            }
        }
        // Nothing to show before the first event.
        if feed.state().is_empty() {
            continue;
        }
        let size = screen.size();
        let mut picture = text(cx, feed.state(), view::Style::screen(size.cols, size.rows))?;
        if lost {
            picture.insert_str(0, "\x1b[7m connection lost, trying again \x1b[0m\n");
        }
        screen.draw(&picture)?;
    }
}

/// A new feed, however long it takes.
async fn reopen(cx: &Context) -> Feed {
    loop {
        tokio::time::sleep(RETRY).await;
        if let Ok(feed) = Feed::open(&cx.client).await {
            return feed;
        }
    }
}
