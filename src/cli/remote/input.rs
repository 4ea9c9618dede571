//! Standard input on its way to a command: inside the request, or through a file in the sandbox.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use hyper::Method;
use tokio_util::io::ReaderStream;

use super::super::client::{Client, counted, encode};
use super::super::stdin::Input;
use super::Command;

/// Longest silence of standard input once it has begun: whoever writes it may have to compute it.
const INPUT_SILENCE: Duration = Duration::from_secs(3600);

/// Opens its first argument as standard input, removes it, and becomes the rest: the command starts
/// with its input whole and leaves no file behind, whatever becomes of it.
const WITH_INPUT: &str = r#"exec <"$0" && rm -f -- "$0" && exec "$@""#;

/// Gives `command` its standard input.
pub async fn attach(
    client: &Client,
    id: &str,
    mut command: Command,
    input: Input,
) -> anyhow::Result<Command> {
    match input {
        Input::None => {}
        Input::Whole(bytes) => match String::from_utf8(bytes) {
            Ok(text) if is_short_in_json(&text) => command.stdin = Some(text),
            Ok(text) => command.stdin_base64 = Some(STANDARD.encode(text)),
            Err(e) => command.stdin_base64 = Some(STANDARD.encode(e.as_bytes())),
        },
        Input::Beginning(bytes) => {
            let path = unique_path();
            upload(client, id, &path, command.user.as_deref(), bytes).await?;
            let mut argv: Vec<String> =
                ["/bin/sh", "-c", WITH_INPUT].into_iter().map(str::to_owned).collect();
            argv.push(path);
            argv.append(&mut command.argv);
            command.argv = argv;
        }
    }
    Ok(command)
}

/// Whether text takes less room in JSON as it is than in base64: quotes, line ends and the like take
/// two bytes each, other control characters six.
fn is_short_in_json(text: &str) -> bool {
    let escaped = |b: u8| match b {
        b'"' | b'\\' | b'\n' | b'\r' | b'\t' => 1,
        0..0x20 => 5,
        _ => 0,
    };
    text.bytes().map(escaped).sum::<usize>() <= text.len() / 3
}

async fn upload(
    client: &Client,
    id: &str,
    path: &str,
    user: Option<&str>,
    beginning: Vec<u8>,
) -> anyhow::Result<()> {
    let sent = Arc::new(AtomicU64::new(0));
    let rest = ReaderStream::with_capacity(tokio::io::stdin(), 64 << 10);
    let pieces = stream::once(async { Ok(Bytes::from(beginning)) }).chain(rest);
    let mut target = format!("/v1/sandboxes/{id}/files?path={}", encode(path));
    if let Some(user) = user {
        target.push_str(&format!("&user={}", encode(user)));
    }
    let request = client
        .request(Method::PUT, &target)
        .header(hyper::header::CONTENT_TYPE, "application/octet-stream")
        .body(counted(pieces, Arc::clone(&sent)))?;
    client.send_counted(request, INPUT_SILENCE, &sent).await?;
    Ok(())
}

fn unique_path() -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let nanos = now.map(|d| d.as_nanos()).unwrap_or_default();
    format!("/tmp/.rethaw-stdin-{}-{nanos}", std::process::id())
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn attached(bytes: &[u8]) -> Command {
        let global = super::super::super::Global {
            url: "http://127.0.0.1:1".into(),
            api_key: Some("k".into()),
            json: false,
        };
        let client = Client::new(&global).unwrap();
        let input = Input::Whole(bytes.to_vec());
        attach(&client, "x", Command::default(), input).await.unwrap()
    }

    #[tokio::test]
    async fn input_goes_as_text_where_it_is_text() {
        let text = attached("grüße\n".as_bytes()).await;
        assert_eq!((text.stdin.as_deref(), text.stdin_base64), (Some("grüße\n"), None));
        let binary = attached(&[0xff, 0]).await;
        assert_eq!((binary.stdin, binary.stdin_base64.as_deref()), (None, Some("/wA=")));
        let control = attached(b"\0\0\0").await;
        assert_eq!(control.stdin_base64.as_deref(), Some("AAAA"));
        let empty = attached(b"").await;
        assert_eq!(empty.stdin.as_deref(), Some(""), "an empty pipe is an end of file at once");
    }

    #[tokio::test]
    async fn the_longest_inline_input_fits_the_services_limit() {
        for byte in [b'"', b'\n', b'a', 0, 0xff] {
            let bytes = vec![byte; super::super::super::stdin::INLINE_MAX];
            let body = serde_json::to_vec(&attached(&bytes).await).unwrap();
            // Room for a long command line besides.
            assert!(body.len() < (1 << 20) - (64 << 10), "{byte}: {}", body.len());
        }
    }
}
