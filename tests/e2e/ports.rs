//! Ports of sandboxes, reached through the service.

use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;

use crate::client::{Client, within};
use crate::service::{Service, id};
use crate::world::in_world;

/// A server that says what it was asked, and speaks WebSocket below `/socket`.
const SERVER: &str = r#"
import base64, hashlib, http.server, json, socket, socketserver, sys
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    def answer(self):
        if self.path.startswith('/socket'): return self.socket()
        body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        if 'chunked' in self.headers.get('Transfer-Encoding', ''):
            while n := int(self.rfile.readline(), 16):
                body += self.rfile.read(n); self.rfile.readline()
            self.rfile.readline()
        said = dict(method=self.command, path=self.path, body=body.decode(),
            headers={k.lower(): v for k, v in self.headers.items()})
        text = json.dumps(said).encode()
        self.send_response(201)
        self.send_header('Content-Length', str(len(text)))
        self.send_header('X-Mine', 'yes')
        self.end_headers()
        self.wfile.write(text)
    def socket(self):
        key = self.headers['Sec-WebSocket-Key'] + '258EAFA5-E914-47DA-95CA-C5AB0DC85B11'
        accept = base64.b64encode(hashlib.sha1(key.encode()).digest()).decode()
        self.wfile.write(('HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n'
            f'Connection: Upgrade\r\nSec-WebSocket-Accept: {accept}\r\n\r\n').encode())
        while True:
            head = self.rfile.read(2)
            if len(head) < 2 or head[0] & 15 == 8: break
            mask = self.rfile.read(4)
            text = bytes(b ^ mask[i % 4] for i, b in enumerate(self.rfile.read(head[1] & 127)))
            self.wfile.write(bytes([0x81, len(text)]) + text)
        self.close_connection = True
    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = answer
    def log_message(self, *a): pass
class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True
Server((sys.argv[1], int(sys.argv[2])), Handler).serve_forever()
"#;

/// Starts the server in the guest and waits until it listens.
async fn serve(service: &Service, id: &str, address: &str, port: u16) {
    let script = "printf %s \"$0\" >/tmp/server.py
setsid python3 /tmp/server.py \"$1\" \"$2\" >/tmp/server.log 2>&1 &
while ! grep -q \":$(printf %04X \"$2\") 00000000:0000 0A\" /proc/net/tcp; do sleep 0.1; done";
    let argv = json!(["sh", "-c", script, SERVER, address, port.to_string()]);
    let done = service.exec(id, &json!({ "argv": argv })).await;
    assert_eq!(done.code(), 0, "{}", done.0);
}

/// Every way to a port that there is.
async fn through_the_service(service: &Service, sandbox: &Value, address: &str) {
    let (id, token) = (id(sandbox), sandbox["access_token"].as_str().unwrap());
    serve(service, &id, address, 8080).await;
    let base = format!("/v1/sandboxes/{id}/ports/8080");
    let anybody = service.client().with_key(None);
    let message = anybody.get(&format!("{base}/x")).await.refused(401, "unauthorized");
    assert!(message.contains("token"), "{message}");
    anybody.with_key(Some("wrong")).get(&base).await.refused(401, "unauthorized");

    // The path, the query and the body pass as they are; what opened the door does not.
    let path = format!("{base}/a%20b/c?d=e%2Ff&g");
    let headers = [("x-access-token", token), ("authorization", "Basic bWU6bWU="), ("x-own", "1")];
    let reply = anybody.send("POST", &path, &headers, "some text").await;
    let said = reply.expect(201);
    assert_eq!(reply.headers["x-mine"], "yes");
    assert_eq!(said["method"], "POST");
    assert_eq!(said["path"], "/a%20b/c?d=e%2Ff&g");
    assert_eq!(said["body"], "some text");
    assert_eq!(said["headers"]["x-own"], "1");
    assert_eq!(said["headers"]["authorization"], "Basic bWU6bWU=", "the guest's own");
    assert_eq!(said["headers"]["host"], "localhost:8080");
    assert_eq!(said["headers"]["x-forwarded-prefix"], base.as_str());
    assert!(said["headers"].get("x-access-token").is_none(), "{said}");
    let said = service.client().get(&base).await.expect(201);
    assert_eq!(said["path"], "/");
    assert!(said["headers"].get("authorization").is_none(), "the key stays here: {said}");

    // By host name.
    let host = format!("8080-{id}.box.example.com");
    let named = |client: &Client, method: &'static str, headers: Vec<(String, String)>| {
        let (client, host) = (client.clone(), host.clone());
        async move {
            let mut all = vec![("host", host.as_str())];
            all.extend(headers.iter().map(|(n, v)| (n.as_str(), v.as_str())));
            client.send(method, "/healthz?x=1", &all, "").await
        }
    };
    let shown = vec![("authorization".to_owned(), format!("Bearer {token}"))];
    let said = named(&anybody, "PUT", shown).await.expect(201);
    assert_eq!((&said["method"], &said["path"]), (&json!("PUT"), &json!("/healthz?x=1")));
    assert_eq!(said["headers"]["host"], host.as_str());
    named(&anybody, "GET", Vec::new()).await.refused(401, "unauthorized");

    // Made public, it is anybody's; the next port is not.
    let policy = json!({ "public_ports": [8080] });
    let path = format!("/v1/sandboxes/{id}/network");
    service.client().json("PATCH", &path, &policy).await.expect(200);
    anybody.get(&format!("{base}/x")).await.expect(201);
    named(&anybody, "GET", Vec::new()).await.expect(201);
    let next = format!("/v1/sandboxes/{id}/ports/8081/");
    anybody.get(&next).await.refused(401, "unauthorized");
    service.client().get(&next).await.refused(502, "port_not_open");
    web_socket(service, &format!("{base}/socket"), None).await;
    service.client().json("PATCH", &path, &json!({ "public_ports": [] })).await.expect(200);
    web_socket(service, &format!("{base}/socket"), Some(token)).await;

    for wrong in ["0", "65536", "http", "+80"] {
        let path = format!("/v1/sandboxes/{id}/ports/{wrong}/");
        service.client().get(&path).await.refused(422, "invalid_field");
    }
}

async fn web_socket(service: &Service, path: &str, token: Option<&str>) {
    let address = service.client().url().trim_start_matches("http://").to_owned();
    let stream = tokio::net::TcpStream::connect(&address).await.unwrap();
    let mut request = format!("ws://{address}{path}").into_client_request().unwrap();
    if let Some(token) = token {
        request.headers_mut().insert("x-access-token", token.parse().unwrap());
    }
    let opened = within("web socket", tokio_tungstenite::client_async(request, stream)).await;
    let (mut socket, _) = opened.unwrap();
    for text in ["one", "another"] {
        socket.send(Message::text(text)).await.unwrap();
        let back = within("echo", socket.next()).await.unwrap().unwrap();
        assert_eq!(back, Message::text(text));
    }
}

#[test]
fn ports_are_reached_over_the_sandboxes_network() {
    in_world(async |_| {
        let service = Service::start_with(1, &["--network", "on"]).await;
        let sandbox = service.create_with(&json!({ "internet": "off" })).await;
        through_the_service(&service, &sandbox, "0.0.0.0").await;
        // What listens on the guest's loopback only is reached, too.
        let id = id(&sandbox);
        serve(&service, &id, "127.0.0.1", 8090).await;
        let path = format!("/v1/sandboxes/{id}/ports/8090/local");
        assert_eq!(service.client().get(&path).await.expect(201)["path"], "/local");
        service.act(&id, "pause", &json!({})).await.expect(200);
        service.client().get(&path).await.refused(409, "wrong_state");
        service.stop().await;
    });
}

#[tokio::test]
async fn ports_are_reached_without_a_network() {
    let service = Service::start(1).await;
    let sandbox = service.create_with(&json!({})).await;
    assert_eq!(sandbox["network"]["attached"], false);
    let wrong = json!({ "template": "base", "internet": "on" });
    let message = service.client().post("/v1/sandboxes", &wrong).await;
    assert!(message.refused(422, "invalid_field").contains("internet"));
    through_the_service(&service, &sandbox, "127.0.0.1").await;
    service.stop().await;
}
